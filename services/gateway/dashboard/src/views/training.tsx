/** Jobs and their curves, with what training costs serving beside them. */
import { useMemo } from "preact/hooks";
import { call } from "../api";
import { Chart } from "../chart";
import { feed } from "../feed";
import { ago, count, metric, rate, seconds } from "../format";
import { JobBadge } from "../job_badge";
import { useStore } from "../store";
import type { Job } from "../types";
import { Empty, Fact, Problem, useAction } from "../ui";
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
            <b>{job.result ? `${job.result.adapter}@${job.result.version}` : String(job.effective_config.adapter ?? "")}</b>
            <span class="job-line">
              <span class="note">
                {job.kind.toUpperCase()} · {job.status === "running" ? `step ${job.progress.step} of ${job.progress.steps || "?"}` : ago(job.created_at)}
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
          {!isOver(job) && (
            <button type="button" disabled={action.isBusy} onClick={() => void action.run(() => call("POST", `/v1/train/jobs/${encodeURIComponent(job.id)}/cancel`))}>
              Cancel
            </button>
          )}
        </div>
        {!isOver(job) && <progress max={job.progress.steps || 1} value={job.progress.step} aria-label="Steps done" />}
        <dl class="facts-list">
          <Fact name="Recipe">{job.kind.toUpperCase()}</Fact>
          <Fact name="Starts from">{job.base_adapter ?? (job.started_at ? "base" : "–")}</Fact>
          <Fact name="Result">{job.result ? `${job.result.adapter}@${job.result.version}` : "–"}</Fact>
          <Fact name="Steps">{`${job.progress.step} of ${job.progress.steps || "?"}`}</Fact>
          <Fact name="Tokens">{count(job.progress.tokens)}</Fact>
          <Fact name="Took">{seconds(took)}</Fact>
          <Fact name="Commit to live">{seconds(job.result?.swap_s)}</Fact>
          <Fact name="Learning rate">{metric(Number(job.effective_config.learning_rate))}</Fact>
        </dl>
        <p class="note">
          <code>{job.id}</code> · <a href={`#/logs/${job.id}`}>its log lines</a>
        </p>
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

function Curves({ job }: { job: Job }) {
  const samples = useStore(feed, (state) => state.samples);
  const curves = useMemo(() => {
    const of = (label: string, name: string, color: string) => ({
      label,
      color,
      values: job.history.map((entry) => entry[name] ?? null),
    });
    return {
      steps: job.history.map((entry) => entry.step ?? 0),
      loss: [of("loss", "loss", "series-1")],
      reward: [of("mean", "reward_mean", "series-2")],
      kl: [of("sampler to trainer", "sampler_trainer_kl", "series-1"), of("to the reference", "kl", "series-3")],
      clip: [of("clipped", "clip_fraction", "series-3")],
      throughput: [of("trained", "tokens_per_s", "series-2")],
    };
  }, [job.history]);
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
  const band = job.started_at
    ? { from: job.started_at, to: job.finished_at ?? Date.now() / 1000, label: "training" }
    : undefined;
  const noStep = "No step has been reported yet.";
  const isPolicy = job.kind === "grpo";
  return (
    <div class="charts">
      <Chart title="Loss by step" x={curves.steps} series={curves.loss} format={metric} empty={noStep} />
      {isPolicy && <Chart title="Reward" x={curves.steps} series={curves.reward} format={metric} empty={noStep} note="Of the completions given; the same in every step over them." />}
      {job.kind !== "sft" && <Chart title="KL divergence" x={curves.steps} series={curves.kl} format={metric} empty="This job reports none." />}
      {isPolicy && <Chart title="Clip fraction" x={curves.steps} series={curves.clip} format={metric} empty="This job reports none." />}
      <Chart title="Training tokens per second" x={curves.steps} series={curves.throughput} format={rate} empty={noStep} />
      <Chart title="Between tokens, while it trained" x={serving.x} series={serving.series} format={seconds} isTime band={band} empty="Nothing was answered meanwhile, or the dashboard was closed." note="Shaded: the job ran. This is what training costs those who chat." />
    </div>
  );
}
