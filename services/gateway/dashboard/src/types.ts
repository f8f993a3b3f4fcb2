/** What the gateway sends: see routes/events.py and docs/api.md. Times are seconds since the epoch. */

export interface Sample {
  at: number;
  engine: Record<string, number>;
  seconds: {
    first_token_p50: number | null;
    first_token_p99: number | null;
    inter_token_p50: number | null;
    inter_token_p99: number | null;
  };
}

export type SplitPart = "edge" | "waiting" | "queue" | "prefill" | "decode";

export interface RequestView {
  id: string;
  index: number;
  adapter: string;
  prompt_tokens: number;
  cached_tokens: number;
  tokens: number;
  started_at: number;
  end: string | null;
  seconds: Partial<Record<SplitPart, number>>;
}

export interface Requests {
  running: RequestView[];
  ended: RequestView[];
}

export interface EngineStatus {
  id: string;
  status: string;
  boot_id?: string;
  device?: string;
  dtype?: string;
  max_model_len?: number;
  max_running?: number;
  memory?: Record<string, number>;
  resident_adapters?: string[];
}

export interface TrainingStatus {
  running_job_id: string | null;
  queued: number;
  borrowed_bytes: number;
  allocated_base_bytes: number;
  device_bytes: number;
  gpu_sharing: string | null;
  gpu_share: number;
}

export interface Status {
  engines: EngineStatus[];
  training: TrainingStatus | null;
}

export type StepMetrics = Record<string, number>;

/** The evaluation that a job's result had to pass. */
export interface Gate {
  suite: string;
  min_score: number;
}

export interface GateOutcome extends Gate {
  passed: boolean;
  /** Why, with numbers. */
  reason: string;
  run: string | null;
  score: number | null;
}

export interface JobResult {
  adapter: string;
  version: number;
  sha256: string;
  not_live: string[];
  swap_s: number;
  gate: GateOutcome | null;
}

export interface Job {
  id: string;
  kind: string;
  status: "queued" | "running" | "succeeded" | "failed" | "cancelled";
  queue_position: number | null;
  progress: { step: number; steps: number; tokens: number; eta_s: number };
  metrics: StepMetrics;
  history: StepMetrics[];
  error: { code: string; message: string; hint: string | null } | null;
  warnings?: { code: string; message: string; hint: string }[];
  result: JobResult | null;
  base_adapter: string | null;
  created_at: number | null;
  started_at: number | null;
  finished_at: number | null;
  effective_config: Record<string, unknown> & { adapter?: string; gate?: Gate | null };
}

export interface Version {
  id: string;
  name: string;
  version: number;
  sha256: string;
  bytes: number;
  rank: number;
  alpha: number;
  targets: string[];
  parent: string | null;
  merged_from?: { mode: string; sources: { id: string; weight: number }[] } | null;
  job_id: string | null;
  data_sha256: string | null;
  metrics: StepMetrics;
  /** What the completions that it learned from earned, by the version that wrote them. */
  rewards_by_version: Record<string, { mean: number; num_completions: number }>;
  created_at: number;
  resident_on: string[];
}

/** A suite's cases answered by one version. */
export interface EvalRun {
  id: string;
  status: "queued" | "running" | "succeeded" | "failed";
  suite: { id: string; name: string; version: number };
  adapter: string;
  progress: { done: number; cases: number };
  score: { mean: number; low: number; high: number } | null;
  error: { code: string; message: string; hint: string | null } | null;
  job_id: string | null;
  created_at: number | null;
}

export interface Adapter {
  name: string;
  latest_version: number | null;
  attached_version: number | null;
  versions: Version[];
}

/** Norms of two versions' updates to the weights, and of their difference. */
export interface Norms {
  norm_from: number;
  norm_to: number;
  norm_change: number;
  cosine: number | null;
}

export interface AdapterDiff {
  from: string | null;
  to: string;
  parent: string | null;
  total: Norms & { cosine_to_parent: number | null };
  layers: (Norms & { layer: number | null })[];
  metrics: Record<string, { from: number | null; to: number | null; delta: number | null }>;
}

export interface LogLine {
  service: string;
  at: string;
  level: string;
  event: string;
  fields: Record<string, string>;
  /** Given here, so that lists have keys. */
  number?: number;
}

export interface Hello {
  model: string | null;
  scopes: string[];
  has_logs: boolean;
  history: Sample[];
}

export interface ToolCall {
  id: string;
  name: string;
  arguments: string;
}

export interface Message {
  role: "system" | "user" | "assistant" | "tool";
  content: string | null;
  tool_calls?: { id: string; type: "function"; function: { name: string; arguments: string } }[];
  tool_call_id?: string;
}
