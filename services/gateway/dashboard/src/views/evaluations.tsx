/** Evaluation runs, the newest first. They are fetched: the feed does not bring them. */
import { useEffect, useState } from "preact/hooks";
import { call, type ApiError } from "../api";
import { ago } from "../format";
import { suiteOf } from "../progress";
import type { Adapter, EvalRun } from "../types";
import { Badge, Problem, useAction } from "../ui";

const FETCHED = 200;
const SHOWN = 12;
const LOOK_AGAIN_MS = 3000;

interface Runs {
  runs: EvalRun[];
  error: ApiError | null;
  /** Fetch them again. */
  look: () => Promise<void>;
}

/** Runs as they are when adapters change, and now and then while one of them is under way. */
export function useRuns(mayEvaluate: boolean, adapters: Adapter[]): Runs {
  const [runs, setRuns] = useState<EvalRun[]>([]);
  const action = useAction();
  const look = () =>
    action.run(async () => {
      const found = await call<{ data: EvalRun[] }>("GET", `/v1/evals/runs?limit=${FETCHED}`);
      setRuns(found.data);
    });
  useEffect(() => {
    if (mayEvaluate) void look();
  }, [mayEvaluate, adapters]);
  useEffect(() => {
    if (action.isBusy || !runs.some(isUnderWay)) return;
    const timer = setTimeout(() => void look(), LOOK_AGAIN_MS);
    return () => clearTimeout(timer);
  }, [runs, action.isBusy]); // also after a look that failed
  return { runs, error: action.error, look };
}

function isUnderWay(run: EvalRun): boolean {
  return run.status === "queued" || run.status === "running";
}

export function Evaluations({ runs, error, look }: Runs) {
  if (!runs.length && !error) return null;
  return (
    <section class="card" aria-labelledby="evaluations-title">
      <h2 id="evaluations-title">Evaluations</h2>
      <Problem error={error} />
      <div class="table-box">
        <table>
          <thead>
            <tr>
              <th>Suite</th>
              <th>Version</th>
              <th>Score</th>
              <th class="spare">When</th>
              <th>
                <span class="hidden">Delete</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {runs.slice(0, SHOWN).map((run) => (
              <Row key={run.id} run={run} look={look} />
            ))}
          </tbody>
        </table>
      </div>
      {runs.length > SHOWN && <p class="note">The newest {SHOWN}. “kiln eval list” shows more.</p>}
    </section>
  );
}

function Row({ run, look }: { run: EvalRun; look: () => Promise<void> }) {
  const action = useAction();
  const [isAsked, setAsked] = useState(false);
  const remove = async () => {
    await call("DELETE", `/v1/evals/runs/${encodeURIComponent(run.id)}`);
    await look();
  };
  return (
    <tr>
      <td class="name">{suiteOf(run)}</td>
      <td class="name">{run.adapter}</td>
      <td>
        <Outcome run={run} />
        <Problem error={action.error} />
      </td>
      <td class="spare">{ago(run.created_at)}</td>
      <td class="number">
        <button
          type="button"
          class="quiet"
          disabled={action.isBusy}
          title={run.id}
          onClick={() => (isAsked ? void action.run(remove) : setAsked(true))}
        >
          {isAsked ? "For good?" : isUnderWay(run) ? "Stop" : "Delete"}
        </button>
      </td>
    </tr>
  );
}

function Outcome({ run }: { run: EvalRun }) {
  if (run.score) {
    const { mean, low, high } = run.score;
    return (
      <>
        <b>{mean.toFixed(2)}</b> <span class="note spare">{`${low.toFixed(2)} to ${high.toFixed(2)}`}</span>
      </>
    );
  }
  if (run.error)
    return (
      <span title={run.error.message}>
        <Badge kind="failed">{run.error.code}</Badge>
      </span>
    );
  const { done, cases } = run.progress;
  return <Badge kind={run.status === "running" ? "running" : "waiting"}>{`${done} of ${cases}`}</Badge>;
}
