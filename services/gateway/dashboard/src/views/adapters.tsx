/** Versions below those they came from, and which of them answers. */
import { useMemo, useState } from "preact/hooks";
import { lineage, type VersionNode } from "../derive";
import { feed } from "../feed";
import { ago, bytes, metric } from "../format";
import { useStore } from "../store";
import type { Adapter } from "../types";
import { Badge, Empty, Problem, useAction } from "../ui";
import { attach, detach, diff, rollBack } from "../versions";

export function Adapters() {
  const adapters = useStore(feed, (state) => state.adapters);
  const roots = useMemo(() => lineage(adapters), [adapters]);
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
        <p class="note">It answers requests for the base model's id. A request keeps the version it began with.</p>
        <Problem error={moving.error} />
      </section>
      <section class="card" aria-labelledby="lineage-title">
        <h2 id="lineage-title">Lineage</h2>
        <ul class="tree">
          {roots.map((node) => (
            <TreeNode key={node.version.id} node={node} attached={attached} />
          ))}
        </ul>
      </section>
      <Difference adapters={adapters} />
    </>
  );
}

function TreeNode({ node, attached }: { node: VersionNode; attached: Adapter | undefined }) {
  const { version } = node;
  const action = useAction();
  const [isOpen, setOpen] = useState(false);
  const isOlder = attached?.name === version.name && version.version < (attached.attached_version ?? 0);
  const reward = version.metrics.reward_mean;
  return (
    <li>
      <div class={`version-row ${node.isAttached ? "attached" : ""}`}>
        <div class="version-name">
          <b>{version.id}</b>
          {node.isAttached && <Badge kind="good">answers now</Badge>}
          {version.resident_on.length > 0 && <Badge kind="quiet">in memory</Badge>}
        </div>
        <span class="note">
          {ago(version.created_at)} · rank {version.rank} · {bytes(version.bytes)}
          {reward !== undefined && ` · reward ${metric(reward)}`}
        </span>
        <div class="buttons">
          {!node.isAttached && (
            <button type="button" disabled={action.isBusy} onClick={() => void action.run(() => attach(version.name, version.version))}>
              Attach
            </button>
          )}
          {isOlder && (
            <button type="button" disabled={action.isBusy} onClick={() => void action.run(() => rollBack(version.name, version.version))}>
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
        <ul>
          {node.children.map((child) => (
            <TreeNode key={child.version.id} node={child} attached={attached} />
          ))}
        </ul>
      )}
    </li>
  );
}

function Details({ node: { version } }: { node: VersionNode }) {
  const facts: [string, string][] = [
    ["sha256", version.sha256],
    ["From", version.parent ?? "base"],
    ["Alpha", String(version.alpha)],
    ["Targets", version.targets.join(", ")],
    ...Object.entries(version.metrics).map(([name, value]): [string, string] => [name, metric(value)]),
  ];
  return (
    <dl class="facts-list">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
      {version.job_id && (
        <div>
          <dt>Job</dt>
          <dd>
            <a href={`#/training/${version.job_id}`}>{version.job_id}</a>
          </dd>
        </div>
      )}
    </dl>
  );
}

function Difference({ adapters }: { adapters: Adapter[] }) {
  const several = adapters.filter((adapter) => adapter.versions.length > 1);
  const [name, setName] = useState("");
  const [pair, setPair] = useState<[number, number] | null>(null);
  const [found, setFound] = useState<Record<string, unknown> | null>(null);
  const action = useAction();
  const adapter = several.find((entry) => entry.name === name) ?? several[0];
  if (!adapter) return null;
  const numbers = adapter.versions.map((version) => version.version).sort((a, b) => a - b);
  const [from, to] = pair ?? [numbers[numbers.length - 2]!, numbers[numbers.length - 1]!];
  return (
    <form
      class="card"
      aria-labelledby="diff-title"
      onSubmit={(event) => {
        event.preventDefault();
        setFound(null);
        void action.run(async () => setFound(await diff(adapter.name, from, to)));
      }}
    >
      <h2 id="diff-title">Compare versions</h2>
      <div class="fields">
        <label>
          Adapter
          <select
            value={adapter.name}
            onChange={(event) => {
              setName(event.currentTarget.value);
              setPair(null);
            }}
          >
            {several.map((entry) => (
              <option key={entry.name}>{entry.name}</option>
            ))}
          </select>
        </label>
        <NumberSelect label="From" value={from} numbers={numbers} onChange={(value) => setPair([value, to])} />
        <NumberSelect label="To" value={to} numbers={numbers} onChange={(value) => setPair([from, value])} />
        <button type="submit" disabled={action.isBusy}>
          Compare
        </button>
      </div>
      <Problem error={action.error} />
      {found && <Findings found={found} />}
    </form>
  );
}

function NumberSelect(props: { label: string; value: number; numbers: number[]; onChange: (value: number) => void }) {
  return (
    <label>
      {props.label}
      <select value={props.value} onChange={(event) => props.onChange(Number(event.currentTarget.value))}>
        {props.numbers.map((number) => (
          <option key={number} value={number}>
            {number}
          </option>
        ))}
      </select>
    </label>
  );
}

/** Whatever the comparison says: plain values as facts, the rest as it came. */
function Findings({ found }: { found: Record<string, unknown> }) {
  const isPlain = (value: unknown) => value === null || typeof value !== "object";
  const plain = Object.entries(found).filter(([, value]) => isPlain(value));
  const nested = Object.entries(found).filter(([, value]) => !isPlain(value));
  return (
    <div class="findings">
      <dl class="facts-list">
        {plain.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{typeof value === "number" ? metric(value) : String(value)}</dd>
          </div>
        ))}
      </dl>
      {nested.map(([name, value]) => (
        <details key={name}>
          <summary>{name}</summary>
          <pre>{JSON.stringify(value, null, 2)}</pre>
        </details>
      ))}
    </div>
  );
}
