/** Whether an adapter gets better: what its versions earned and scored, one after the other. */
import { useMemo } from "preact/hooks";
import { Chart, type Series } from "../chart";
import { metric } from "../format";
import { rewardsOf, scoresOf, START } from "../progress";
import type { Adapter, EvalRun } from "../types";

const COLORS = ["series-1", "series-2", "series-3"];

interface Curve {
  title: string;
  versions: number[];
  series: Series[];
  note: string;
}

export function Progress({ adapters, runs }: { adapters: Adapter[]; runs: EvalRun[] }) {
  const curves = useMemo(
    () => adapters.filter((adapter) => adapter.versions.length > 0).flatMap((each) => curvesOf(each, runs)),
    [adapters, runs],
  );
  if (!curves.length) return null;
  return (
    <div class="charts">
      {curves.map(({ title, versions, series, note }) => (
        <Chart
          key={title}
          title={title}
          x={versions}
          series={series}
          format={metric}
          label={(number) => (number === START ? "start" : `@${number}`)}
          joins
          empty=""
          note={note}
        />
      ))}
    </div>
  );
}

function curvesOf(adapter: Adapter, runs: EvalRun[]): Curve[] {
  const { versions, means } = rewardsOf(adapter);
  const rewards = {
    title: `Reward of ${adapter.name}, by version`,
    versions,
    series: [{ label: "mean", color: "series-2", values: means }],
    note: "Of the answers that each version gave and a job learned from; the newest has none yet.",
  };
  const scored = scoresOf(adapter, runs, COLORS.length);
  const scores = {
    title: `Scores of ${adapter.name}, by version`,
    versions: scored.versions,
    series: [...scored.means].map(([label, values], place) => ({ label, color: COLORS[place]!, values })),
    note: "Mean scores of the newest evaluations, those of gates included.",
  };
  return [rewards, scores].filter((curve) => curve.versions.length > 1);
}
