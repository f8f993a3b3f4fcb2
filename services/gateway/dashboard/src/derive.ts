/** What is computed from samples: rates, ratios, lists of versions. */
import { rewardsOf } from "./progress";
import type { Adapter, Sample, Version } from "./types";

/** Samples are taken while somebody watches; a longer time between two was not watched. */
const MOST_BETWEEN_S = 5;

/** One number of each sample; null, where a line breaks, after a time that nobody watched. */
export function valuesOf(
  samples: Sample[],
  of: (sample: Sample) => number | null | undefined,
): (number | null)[] {
  return samples.map((sample, index) => {
    const before = samples[index - 1];
    return before && sample.at - before.at >= MOST_BETWEEN_S ? null : (of(sample) ?? null);
  });
}

/** The counter's growth by the second at each sample; null across a restart of an engine. */
export function ratesOf(samples: Sample[], counter: string): (number | null)[] {
  return samples.map((sample, index) => {
    const before = samples[index - 1];
    if (!before) return null;
    const passed = sample.at - before.at;
    const grown = (sample.engine[counter] ?? 0) - (before.engine[counter] ?? 0);
    // There is no telling when in a time that nobody watched the tokens came.
    return passed > 0 && passed < MOST_BETWEEN_S && grown >= 0 ? grown / passed : null;
  });
}

export function latest<T>(values: (T | null)[]): T | null {
  return values.length ? (values[values.length - 1] ?? null) : null;
}

export interface VersionNode {
  version: Version;
  isAttached: boolean;
  /** What the bare name means. */
  isLatest: boolean;
  /** Mean reward of its answers, as far as they were learned from. */
  earned: number | undefined;
  children: VersionNode[];
}

/** Versions below the ones they were trained from; those without a known parent are roots. */
export function lineage(adapters: Adapter[]): VersionNode[] {
  const nodes = new Map<string, VersionNode>();
  for (const adapter of adapters.filter((each) => each.versions.length > 0)) {
    const { versions, means } = rewardsOf(adapter);
    for (const version of adapter.versions)
      nodes.set(version.id, {
        version,
        isAttached: adapter.attached_version === version.version,
        isLatest: adapter.latest_version === version.version,
        earned: means[versions.indexOf(version.version)],
        children: [],
      });
  }
  const roots: VersionNode[] = [];
  for (const node of nodes.values()) {
    const parent = node.version.parent ? nodes.get(node.version.parent) : undefined;
    (parent ? parent.children : roots).push(node);
  }
  return roots;
}

export function attachedOf(adapters: Adapter[]): string | null {
  const found = adapters.find((adapter) => adapter.attached_version !== null);
  return found ? `${found.name}@${found.attached_version}` : null;
}

/** Names that a request may put in `model`, the served model first. */
export function modelChoices(served: string | null, adapters: Adapter[]): { id: string; label: string }[] {
  const attached = attachedOf(adapters);
  const first = served
    ? [{ id: served, label: attached ? `${served} (now ${attached})` : `${served} (no adapter)` }]
    : [];
  const versions = adapters.flatMap((adapter) =>
    [...adapter.versions]
      .sort((a, b) => b.version - a.version)
      .map((version) => ({ id: version.id, label: version.id })),
  );
  return [...first, { id: "base", label: "base (bare model)" }, ...versions];
}
