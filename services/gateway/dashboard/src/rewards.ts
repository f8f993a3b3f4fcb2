/** What the completions of each version of a name earned, as far as they were learned from. */
import type { Adapter } from "./types";

/** The place on the curve of what the first version was trained from. */
export const START = 0;

/** Mean rewards by version, in order of the versions. Data that several versions learned from count once. */
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

/** Where on the curve a version stands, by its id. */
function numbersOf(adapter: Adapter): Map<string, number> {
  const first = adapter.versions.reduce((low, version) => (version.version < low.version ? version : low));
  const numbers = new Map(adapter.versions.map((version) => [version.id, version.version]));
  return numbers.set(first.parent ?? "base", START);
}
