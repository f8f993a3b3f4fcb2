/** From ratings to a GRPO job, by the ids of the completions. */
import { call } from "../api";
import { takeJobs } from "../feed";
import type { Job } from "../types";
import { changeRound, learner, playground, type Round } from "./state";

export interface Rated {
  groups: { rollouts: { completion_id: string; index: number; reward: number }[] }[];
  roundIds: number[];
  numAnswers: number;
  /** Rounds that teach nothing yet: a single rating, or all the same. */
  numWithoutSignal: number;
}

/** What can be sent: rounds not sent yet in which two answers were rated differently. */
export function rated(rounds: Round[]): Rated {
  const found: Rated = { groups: [], roundIds: [], numAnswers: 0, numWithoutSignal: 0 };
  for (const round of rounds) {
    if (round.jobId) continue;
    const rollouts = round.columns.flatMap((column) =>
      column.answers.flatMap((answer) =>
        answer.reward !== null && column.completionId
          ? [{ completion_id: column.completionId, index: answer.index, reward: answer.reward }]
          : [],
      ),
    );
    if (new Set(rollouts.map((rollout) => rollout.reward)).size > 1) {
      found.groups.push({ rollouts });
      found.roundIds.push(round.id);
      found.numAnswers += rollouts.length;
    } else if (rollouts.length) found.numWithoutSignal += 1;
  }
  return found;
}

export async function teach(): Promise<Job> {
  const state = playground.value;
  const { lesson, rounds } = state;
  const { groups, roundIds } = rated(rounds);
  const job = await call<Job>("POST", "/v1/train/grpo", {
    adapter: learner(state),
    groups,
    learning_rate: lesson.learningRate,
    epochs: lesson.epochs,
  });
  takeJobs([job]);
  for (const id of roundIds) changeRound(id, (round) => ({ ...round, jobId: job.id }));
  return job;
}
