/** What training changed between two versions of a name. */
import { useState } from "preact/hooks";
import { metric } from "../format";
import type { Adapter, AdapterDiff } from "../types";
import { Fact, PartsBar, Problem, useAction } from "../ui";
import { diff } from "../versions";

export function Difference({ adapters }: { adapters: Adapter[] }) {
  const several = adapters.filter((adapter) => adapter.versions.length > 1);
  const [name, setName] = useState("");
  const [pair, setPair] = useState<[number, number] | null>(null);
  const [found, setFound] = useState<AdapterDiff | null>(null);
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
        <NumberSelect
          label="From"
          value={from}
          numbers={numbers}
          onChange={(value) => setPair([value, to])}
        />
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

function NumberSelect(props: {
  label: string;
  value: number;
  numbers: number[];
  onChange: (value: number) => void;
}) {
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

function Findings({ found }: { found: AdapterDiff }) {
  const most = Math.max(...found.layers.map((layer) => layer.norm_change), Number.MIN_VALUE);
  const metrics = Object.entries(found.metrics).filter(
    ([, values]) => values.delta && metric(values.from) !== metric(values.to),
  );
  return (
    <div class="findings" role="region" aria-label="Differences">
      <dl class="facts-list">
        <Fact name="Compared">{`${found.from ?? "base"} → ${found.to}`}</Fact>
        <Fact name="Norm of the update before">{metric(found.total.norm_from)}</Fact>
        <Fact name="Norm after">{metric(found.total.norm_to)}</Fact>
        <Fact name="Norm of the change">{metric(found.total.norm_change)}</Fact>
        <Fact name="Cosine of the two">{metric(found.total.cosine)}</Fact>
      </dl>
      <div class="columns">
        <table>
          <caption class="note">Change by layer (Frobenius norm)</caption>
          <tbody>
            {found.layers.map((layer) => (
              <tr key={layer.layer}>
                <th scope="row">{layer.layer === null ? "others" : `layer ${layer.layer}`}</th>
                <td class="bar">
                  <PartsBar
                    total={most}
                    parts={[{ name: "change", value: layer.norm_change, color: "series-1" }]}
                    label={metric(layer.norm_change)}
                  />
                </td>
                <td class="number">{metric(layer.norm_change)}</td>
              </tr>
            ))}
          </tbody>
        </table>
        {metrics.length > 0 && (
          <table>
            <caption class="note">Metrics that moved</caption>
            <thead>
              <tr>
                <th>
                  <span class="hidden">Metric</span>
                </th>
                <th class="number">{found.from}</th>
                <th class="number">{found.to}</th>
              </tr>
            </thead>
            <tbody>
              {metrics.map(([name, values]) => (
                <tr key={name}>
                  <th scope="row">{name}</th>
                  <td class="number">{metric(values.from)}</td>
                  <td class="number">{metric(values.to)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        )}
      </div>
    </div>
  );
}
