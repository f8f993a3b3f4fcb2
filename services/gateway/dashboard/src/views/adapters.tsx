/** Versions below those they came from, and which of them answers. */
import { useMemo, useState } from "preact/hooks";
import { lineage, type VersionNode } from "../derive";
import { feed } from "../feed";
import { ago, bytes, metric } from "../format";
import { useStore } from "../store";
import type { Adapter, Version } from "../types";
import { Badge, Empty, Fact, Problem, useAction } from "../ui";
import { attach, detach, rollBack } from "../versions";
import { Difference } from "./difference";
import { Evaluations, useRuns } from "./evaluations";
import { Progress } from "./progress";

export function Adapters() {
  const adapters = useStore(feed, (state) => state.adapters);
  const roots = useMemo(() => lineage(adapters), [adapters]);
  const mayEvaluate = useStore(feed, (state) => state.hello?.scopes.includes("train") ?? false);
  const evaluations = useRuns(mayEvaluate, adapters);
  const { runs } = evaluations;
  const moving = useAction();
  if (!adapters.length)
    return (
      <Empty title="No adapters yet">
        A training job publishes the first version. Rate answers in the <a href="#/playground">playground</a>.
      </Empty>
    );
  const attached = adapters.find((adapter) => adapter.attached_version !== null);
  return (
    <>
      <section class="card" aria-labelledby="default-title">
        <div class="head">
          <h2 id="default-title">Default adapter</h2>
          {attached ? (
            <Badge kind="version">
              {attached.name}@{attached.attached_version}
            </Badge>
          ) : (
            <Badge kind="quiet">none: the bare base model answers</Badge>
          )}
          {attached && (
            <button type="button" disabled={moving.isBusy} onClick={() => void moving.run(detach)}>
              Detach
            </button>
          )}
        </div>
        <p class="note">
          It answers requests for the base model's id. A request keeps the version it began with.
        </p>
        <Problem error={moving.error} />
      </section>
      <Progress adapters={adapters} runs={runs} />
      <section class="card" aria-labelledby="lineage-title">
        <h2 id="lineage-title">Lineage</h2>
        <ul class="tree">
          {roots.map((node) => (
            <TreeNode key={node.version.id} node={node} attached={attached} />
          ))}
        </ul>
      </section>
      <Difference adapters={adapters} />
      {mayEvaluate && <Evaluations runs={runs} error={evaluations.error} look={evaluations.look} />}
    </>
  );
}

function TreeNode({ node, attached }: { node: VersionNode; attached: Adapter | undefined }) {
  const { version, earned } = node;
  const action = useAction();
  const [isOpen, setOpen] = useState(false);
  const isOlder = attached?.name === version.name && version.version < (attached.attached_version ?? 0);
  return (
    <li>
      <div class={`version-row ${node.isAttached ? "attached" : ""}`}>
        <div class="version-name">
          <b>{version.id}</b>
          {node.isAttached && <Badge kind="good">answers now</Badge>}
          {node.isLatest && <Badge kind="version">latest</Badge>}
          {version.resident_on.length > 0 && <Badge kind="quiet">in memory</Badge>}
        </div>
        <span class="note">
          {ago(version.created_at)} · rank {version.rank} · {bytes(version.bytes)}
          {earned !== undefined && ` · its answers earned ${metric(earned)}`}
        </span>
        <div class="buttons">
          {!node.isAttached && (
            <button
              type="button"
              disabled={action.isBusy}
              onClick={() => void action.run(() => attach(version.name, version.version))}
            >
              Attach
            </button>
          )}
          {isOlder && (
            <button
              type="button"
              disabled={action.isBusy}
              onClick={() => void action.run(() => rollBack(version.name, version.version))}
            >
              Roll back to it
            </button>
          )}
          <button type="button" class="quiet" aria-expanded={isOpen} onClick={() => setOpen(!isOpen)}>
            Details
          </button>
        </div>
      </div>
      <Problem error={action.error} />
      {isOpen && <Details node={node} />}
      {node.children.length > 0 && (
        <ul class={node.children.length === 1 ? "only" : undefined}>
          {node.children.map((child) => (
            <TreeNode key={child.version.id} node={child} attached={attached} />
          ))}
        </ul>
      )}
    </li>
  );
}

function mergeOf(merged: NonNullable<Version["merged_from"]>): string {
  return `${merged.mode} of ${merged.sources.map((source) => `${source.weight} × ${source.id}`).join(", ")}`;
}

function Details({ node: { version } }: { node: VersionNode }) {
  const facts: [string, string][] = [
    ["sha256", version.sha256],
    ["From", version.merged_from ? mergeOf(version.merged_from) : (version.parent ?? "base")],
    ["Alpha", String(version.alpha)],
    ["Targets", version.targets.join(", ")],
    ...Object.entries(version.metrics).map(([name, value]): [string, string] => [name, metric(value)]),
  ];
  return (
    <dl class="facts-list">
      {facts.map(([name, value]) => (
        <Fact key={name} name={name}>
          {value}
        </Fact>
      ))}
      {version.job_id && (
        <Fact name="Job">
          <a href={`#/training/${version.job_id}`}>{version.job_id}</a>
        </Fact>
      )}
    </dl>
  );
}
