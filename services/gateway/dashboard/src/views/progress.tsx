/** Whether an adapter gets better: what its versions earned, one after the other. */
import { useMemo } from "preact/hooks";
import { Chart } from "../chart";
import { metric } from "../format";
import { rewardsOf, START } from "../rewards";
import type { Adapter } from "../types";

export function Progress({ adapters }: { adapters: Adapter[] }) {
  const learned = adapters.filter((adapter) => adapter.versions.length > 0);
  const curves = useMemo(
    () => learned.map((adapter) => ({ name: adapter.name, ...rewardsOf(adapter) })),
    [adapters],
  );
  const known = curves.filter((curve) => curve.versions.length > 0);
  if (!known.length) return null;
  return (
    <div class="charts">
      {known.map((curve) => (
        <Rewards key={curve.name} {...curve} />
      ))}
    </div>
  );
}

function Rewards({ name, versions, means }: { name: string; versions: number[]; means: number[] }) {
  const series = useMemo(() => [{ label: "mean", color: "series-2", values: means }], [means]);
  return (
    <Chart
      title={`Reward of ${name}, by version`}
      x={versions}
      series={series}
      format={metric}
      label={(number) => (number === START ? "start" : `@${number}`)}
      empty=""
      note="Of the answers each version gave, as the next job was told. The newest has none until then."
    />
  );
}
