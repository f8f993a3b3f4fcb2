/** Sends ratings to training, shows what becomes of them, and offers the way there and back. */
import { useState } from "preact/hooks";
import { Chart } from "../chart";
import { feed } from "../feed";
import { metric, seconds } from "../format";
import { JobBadge } from "../job_badge";
import { JobWarnings } from "../job_warnings";
import { useStore } from "../store";
import type { Job, Message } from "../types";
import { Problem, useAction } from "../ui";
import { useWholeJob } from "../whole_job";
import { attach, detach, parseReference, rollBack } from "../versions";
import { NumberField } from "./prompt_form";
import { ask, learner, playground, type Lesson, type Round } from "./state";
import { rated, teach } from "./teach";

export function TeachForm() {
  const state = useStore(playground, (state) => state);
  const { rounds, lesson } = state;
  const mayTrain = useStore(feed, (state) => state.hello?.scopes.includes("train") ?? false);
  const setLesson = (changed: Lesson) => playground.update({ lesson: changed });
  const action = useAction();
  const ready = rated(rounds);
  if (!rounds.length) return null;
  const words = ready.groups.length
    ? `${ready.numAnswers} rated answers to ${ready.groups.length === 1 ? "one prompt" : `${ready.groups.length} prompts`}`
    : ready.numWithoutSignal
      ? "Rate two answers to one prompt differently: what is learned is the difference."
      : "Rate answers, and the model learns to prefer the better ones.";
  return (
    <form
      class="card teach"
      aria-label="Train on the ratings"
      onSubmit={(event) => {
        event.preventDefault();
        void action.run(teach);
      }}
    >
      <p class="lead">{words}</p>
      <div class="fields">
        <label>
          Adapter
          <input
            value={learner(state)}
            required
            pattern="[A-Za-z0-9][A-Za-z0-9._\-]*"
            onInput={(event) => setLesson({ ...lesson, adapter: event.currentTarget.value })}
          />
        </label>
        <NumberField
          label="Learning rate"
          value={lesson.learningRate}
          min={0}
          max={1}
          step="any"
          onChange={(learningRate) => setLesson({ ...lesson, learningRate })}
        />
        <NumberField
          label="Steps"
          value={lesson.epochs}
          min={1}
          max={100}
          step={1}
          onChange={(epochs) => setLesson({ ...lesson, epochs })}
        />
        <button type="submit" class="primary" disabled={!ready.groups.length || action.isBusy || !mayTrain}>
          Train on them
        </button>
      </div>
      {!mayTrain && <p class="note">This key may not train: it lacks the scope “train”.</p>}
      <Problem error={action.error} />
    </form>
  );
}

/** The job that a round's ratings went to. */
export function LessonProgress({ round }: { round: Round }) {
  const job = useStore(feed, (state) => state.jobs.find((found) => found.id === round.jobId));
  return job ? <Progress job={job} round={round} /> : null;
}

function Progress({ job, round }: { job: Job; round: Round }) {
  useWholeJob(job);
  const steps = job.history.map((entry) => entry.step ?? 0);
  const line = (label: string, name: string, color: string) => [
    { label, color, values: job.history.map((entry) => entry[name] ?? null) },
  ];
  return (
    <section class="lesson" aria-label="Training on these ratings">
      <header>
        <JobBadge job={job} />
        <span>{progressOf(job)}</span>
        <a href={`#/training/${job.id}`}>All curves</a>
      </header>
      {steps.length > 0 && (
        <Chart
          title="Loss"
          x={steps}
          series={line("loss", "loss", "series-1")}
          format={metric}
          empty="No step yet."
        />
      )}
      <JobWarnings job={job} />
      {job.error && (
        <div class="problem" role="alert">
          <b>{job.error.message}</b>
          {job.error.hint && <p>{job.error.hint}</p>}
        </div>
      )}
      {job.status === "succeeded" && <Outcome job={job} messages={round.messages} />}
    </section>
  );
}

/** The default is again what it was before the job: an earlier version, another adapter, or none. */
function goBack(job: Job): Promise<unknown> {
  const earlier = parseReference(job.base_adapter ?? "base");
  if (!earlier) return detach();
  return earlier[0] === job.result?.adapter ? rollBack(...earlier) : attach(...earlier);
}

function progressOf(job: Job): string {
  if (job.status === "queued")
    return job.queue_position ? `${job.queue_position} jobs before it` : "next in the queue";
  if (job.status === "running") return `step ${job.progress.step} of ${job.progress.steps || "?"}`;
  if (job.result)
    return `${job.result.adapter}@${job.result.version} was live ${seconds(job.result.swap_s)} after it was published`;
  return "";
}

function Outcome({ job, messages }: { job: Job; messages: Message[] }) {
  const settings = useStore(playground, (state) => state.settings);
  const asking = useAction();
  const moving = useAction();
  const [isBack, setBack] = useState(false);
  if (!job.result) return null;
  const after = `${job.result.adapter}@${job.result.version}`;
  const before = job.base_adapter ?? "base";
  return (
    <>
      <div class="buttons">
        <button
          type="button"
          class="primary"
          disabled={asking.isBusy}
          onClick={() => void asking.run(() => ask(messages, [before, after], settings))}
        >
          Ask before and after
        </button>
        <button
          type="button"
          disabled={moving.isBusy || isBack}
          onClick={() =>
            void moving.run(async () => {
              await goBack(job);
              setBack(true);
            })
          }
        >
          Roll back to {before}
        </button>
        {isBack && <span role="status">{before} answers again.</span>}
      </div>
      <Problem error={asking.error} />
      <Problem error={moving.error} />
    </>
  );
}
