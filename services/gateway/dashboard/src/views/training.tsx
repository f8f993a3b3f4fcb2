/** Jobs and their curves, with what training costs serving beside them. */
import { useMemo } from "preact/hooks";
import { call } from "../api";
import { Chart } from "../chart";
import { feed, takeJobs } from "../feed";
import { ago, count, metric, rate, seconds } from "../format";
import { isHeldBack, JobBadge } from "../job_badge";
import { JobWarnings } from "../job_warnings";
import { useStore } from "../store";
import type { Job } from "../types";
import { Badge, Empty, Fact, Problem, useAction } from "../ui";
import { isOver, useWholeJob } from "../whole_job";

export function Training({ jobId }: { jobId: string }) {
  const jobs = useStore(feed, (state) => state.jobs);
  const mayTrain = useStore(feed, (state) => state.hello?.scopes.includes("train") ?? true);
  const chosen = jobs.find((job) => job.id === jobId) ?? (jobId ? undefined : jobs[0]);
  if (!mayTrain) return <Empty title="This key may not see jobs">It lacks the scope “train”.</Empty>;
  if (!jobs.length)
    return (
      <Empty title="No training jobs yet">
        Rate answers in the <a href="#/playground">playground</a>, or post rewards to /v1/train/grpo.
      </Empty>
    );
  return (
    <div class="training">
      <nav class="card job-list" aria-label="Jobs">
        {jobs.map((job) => (
          <a key={job.id} href={`#/training/${job.id}`} aria-current={job === chosen ? "true" : undefined}>
            <b>
              {job.result && !isHeldBack(job)
                ? `${job.result.adapter}@${job.result.version}`
                : String(job.effective_config.adapter ?? "")}
            </b>
            <span class="job-line">
              <span class="note">
                {job.kind.toUpperCase()} ·{" "}
                {job.status === "running"
                  ? `step ${job.progress.step} of ${job.progress.steps || "?"}`
                  : ago(job.created_at)}
              </span>
              <JobBadge job={job} />
            </span>
          </a>
        ))}
      </nav>
      {chosen ? <JobDetail key={chosen.id} job={chosen} /> : <Empty title="There is no such job" />}
    </div>
  );
}

function cancel(job: Job): Promise<Job> {
  return call("POST", `/v1/train/jobs/${encodeURIComponent(job.id)}/cancel`);
}

/** The same data and settings from the same version, as a new job, which is then shown. */
async function retry(job: Job): Promise<void> {
  const again = await call<Job>("POST", `/v1/train/jobs/${encodeURIComponent(job.id)}/retry`, {});
  takeJobs([again]);
  location.hash = `#/training/${again.id}`;
}

function JobDetail({ job }: { job: Job }) {
  const fetching = useWholeJob(job);
  const action = useAction();
  const took = job.started_at ? (job.finished_at ?? Date.now() / 1000) - job.started_at : null;
  return (
    <section class="job" aria-label={`Job ${job.id}`}>
      <div class="card">
        <div class="head">
          <h2>{String(job.effective_config.adapter ?? job.id)}</h2>
          <JobBadge job={job} />
          <button
            type="button"
            disabled={action.isBusy}
            onClick={() => void action.run(() => (isOver(job) ? retry(job) : cancel(job)))}
          >
            {isOver(job) ? "Do it again" : "Cancel"}
          </button>
        </div>
        {!isOver(job) && (
          <progress max={job.progress.steps || 1} value={job.progress.step} aria-label="Steps done" />
        )}
        <dl class="facts-list">
          <Fact name="Recipe">{job.kind.toUpperCase()}</Fact>
          <Fact name="Starts from">{job.base_adapter ?? (job.started_at ? "base" : "–")}</Fact>
          <Fact name={isHeldBack(job) ? "Kept as" : "Result"}>
            {job.result ? `${job.result.adapter}@${job.result.version}` : "–"}
          </Fact>
          <Fact name="Steps">{`${job.progress.step} of ${job.progress.steps || "?"}`}</Fact>
          <Fact name="Tokens">{count(job.progress.tokens)}</Fact>
          <Fact name="Took">{seconds(took)}</Fact>
          <Fact name="Commit to live">{seconds(job.result?.swap_s)}</Fact>
          <Fact name="Learning rate">{metric(Number(job.effective_config.learning_rate))}</Fact>
        </dl>
        <Gate job={job} />
        <p class="note">
          <code>{job.id}</code> · <a href={`#/logs/${job.id}`}>its log lines</a>
        </p>
        <JobWarnings job={job} />
        {job.error && (
          <div class="problem" role="alert">
            <b>{job.error.message}</b>
            {job.error.hint && <p>{job.error.hint}</p>}
            <code>{job.error.code}</code>
          </div>
        )}
        <Problem error={action.error ?? fetching.error} />
      </div>
      <Curves job={job} />
    </section>
  );
}

/** What the result has to reach, and whether it did. */
function Gate({ job }: { job: Job }) {
  const outcome = job.result?.gate;
  const gate = outcome ?? job.effective_config.gate;
  if (!gate) return null;
  return (
    <section class="gate" aria-label="Gate">
      <div class="head">
        <b>Gate</b>
        {outcome && (
          <Badge kind={outcome.passed ? "good" : "warning"}>{outcome.passed ? "passed" : "held back"}</Badge>
        )}
        <span class="note">
          {outcome?.score != null && `scored ${metric(outcome.score)} on ${gate.suite}, `}
          {`at least ${metric(gate.min_score)} `}
          {outcome?.score != null ? "was needed" : `is needed on ${gate.suite}`}
        </span>
      </div>
      {outcome && outcome.score == null && <p class="note">{outcome.reason}</p>}
      {outcome && !outcome.passed && (
        <p class="note">
          {String(job.effective_config.adapter)} means what it meant before. The result can be asked by its
          own name, attached or deleted.
        </p>
      )}
    </section>
  );
}

function Curves({ job }: { job: Job }) {
  const curve = (label: string, name: string, color: string) => ({
    label,
    color,
    values: job.history.map((entry) => entry[name] ?? null),
  });
  const curves = useMemo(
    () => ({
      steps: job.history.map((entry) => entry.step ?? 0),
      loss: [curve("loss", "loss", "series-1")],
      reward: [curve("mean", "reward_mean", "series-2")],
      kl: [
        curve("sampler to trainer", "sampler_trainer_kl", "series-1"),
        job.kind === "opd"
          ? curve("to the teacher", "teacher_kl", "series-3")
          : curve("to the reference", "kl", "series-3"),
      ],
      clip: [curve("clipped", "clip_fraction", "series-3")],
      throughput: [curve("trained", "tokens_per_s", "series-2")],
    }),
    [job.kind, job.history],
  );
  const common = { x: curves.steps, format: metric, empty: "No step has reported it yet." };
  const isPolicy = job.kind === "grpo";
  const given = "Of the completions given; the same in every step over them.";
  return (
    <div class="charts">
      <Chart {...common} title="Loss by step" series={curves.loss} />
      {isPolicy && <Chart {...common} title="Reward" series={curves.reward} note={given} />}
      {job.kind !== "sft" && <Chart {...common} title="KL divergence" series={curves.kl} />}
      {isPolicy && <Chart {...common} title="Clip fraction" series={curves.clip} />}
      <Chart {...common} title="Training tokens per second" series={curves.throughput} format={rate} />
      <Serving job={job} />
    </div>
  );
}

/** The time between tokens of those who chatted, from shortly before the job to shortly after it. */
function Serving({ job }: { job: Job }) {
  const samples = useStore(feed, (state) => state.samples);
  const serving = useMemo(() => {
    const from = (job.started_at ?? 0) - 30;
    const to = (job.finished_at ?? Infinity) + 30;
    const near = samples.filter((sample) => sample.at >= from && sample.at <= to);
    return {
      x: near.map((sample) => sample.at),
      series: [
        { label: "p50", color: "series-1", values: near.map((sample) => sample.seconds.inter_token_p50) },
        { label: "p99", color: "series-3", values: near.map((sample) => sample.seconds.inter_token_p99) },
      ],
    };
  }, [samples, job.started_at, job.finished_at]);
  return (
    <Chart
      title="Between tokens, while it trained"
      x={serving.x}
      series={serving.series}
      format={seconds}
      isTime
      band={job.started_at ? { from: job.started_at, to: job.finished_at ?? Date.now() / 1000 } : undefined}
      empty="Nothing was answered meanwhile, or the dashboard was closed."
      note="Shaded: the job ran. This is what training costs those who chat."
    />
  );
}
