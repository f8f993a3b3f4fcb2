/** Whether a name's versions get better: what their answers earned, and how they scored. */
import type { Adapter, EvalRun } from "./types";

/** The place on the curve of what the first version was trained from. */
export const START = 0;

/**
 * Mean rewards of what each version wrote, as far as it was learned from, in order of the versions.
 * Data that several versions learned from count once.
 */
export function rewardsOf(adapter: Adapter): { versions: number[]; means: number[] } {
  const sums = new Map<number, { reward: number; count: number }>();
  const numbers = numbersOf(adapter);
  const seen = new Set<string>();
  for (const version of adapter.versions) {
    const data = version.data_sha256 ?? version.id;
    if (seen.has(data)) continue;
    seen.add(data);
    for (const [writer, { mean, num_completions }] of Object.entries(version.rewards_by_version)) {
      const number = numbers.get(writer);
      if (number === undefined) continue;
      const sum = sums.get(number) ?? { reward: 0, count: 0 };
      sums.set(number, {
        reward: sum.reward + mean * num_completions,
        count: sum.count + num_completions,
      });
    }
  }
  const versions = [...sums.keys()].sort((a, b) => a - b);
  const means = versions.map((number) => sums.get(number)!).map((sum) => sum.reward / sum.count);
  return { versions, means };
}

export interface Scores {
  versions: number[];
  /** By suite; null for a version that was not evaluated on it. */
  means: Map<string, (number | null)[]>;
}

/** The newest scores of a name's versions on the suites used last. `runs` are the newest first. */
export function scoresOf(adapter: Adapter, runs: EvalRun[], mostSuites: number): Scores {
  const numbers = numbersOf(adapter);
  const found = new Map<string, Map<number, number>>();
  for (const run of runs) {
    // A gate judged its version before that had its name.
    const judged = adapter.versions.find((version) => run.job_id !== null && version.job_id === run.job_id);
    const number = numbers.get(run.adapter) ?? judged?.version;
    if (number === undefined || !run.score) continue;
    const suite = suiteOf(run);
    if (!found.has(suite) && found.size === mostSuites) continue;
    const scores = found.get(suite) ?? new Map<number, number>();
    if (!scores.has(number)) scores.set(number, run.score.mean);
    found.set(suite, scores);
  }
  const versions = [...new Set([...found.values()].flatMap((scores) => [...scores.keys()]))];
  versions.sort((a, b) => a - b);
  const means = [...found].map(([suite, scores]): [string, (number | null)[]] => [
    suite,
    versions.map((number) => scores.get(number) ?? null),
  ]);
  return { versions, means: new Map(means) };
}

export function suiteOf(run: EvalRun): string {
  return `${run.suite.name}@${run.suite.version}`;
}

/** Where on the curve a version stands, by its id. */
function numbersOf(adapter: Adapter): Map<string, number> {
  const first = adapter.versions.reduce((low, version) => (version.version < low.version ? version : low));
  const numbers = new Map(adapter.versions.map((version) => [version.id, version.version]));
  return numbers.set(first.parent ?? "base", START);
}
