/** A line chart by uPlot, with its own legend that also says the values under the pointer. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { theme } from "./theme";
import { useStore } from "./store";

export interface Series {
  label: string;
  /** The name of a colour in style.css, without its dashes. */
  color: string;
  values: (number | null)[];
}

interface Props {
  title: string;
  x: number[];
  series: Series[];
  format: (value: number | null | undefined) => string;
  /** x are times rather than steps. */
  isTime?: boolean;
  /** How a step is called on the axis; its number unless this says otherwise. */
  label?: (step: number) => string;
  /** Lines go on past steps without a value. */
  joins?: boolean;
  /** Values are whole numbers, and so are the ticks. */
  whole?: boolean;
  /** A stretch of x to mark. */
  band?: { from: number; to: number };
  empty: string;
  note?: string;
}

const HEIGHT = 150;
// As many points are marked one by one.
const FEW_POINTS = 40;
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];

/** Draws into the element that the reference gets; returns the index under the pointer. */
function usePlot(host: { current: HTMLDivElement | null }, props: Props, hasData: boolean): number | null {
  const [hovered, setHovered] = useState<number | null>(null);
  const plot = useRef<uPlot | null>(null);
  const latest = useRef(props);
  latest.current = props;
  const scheme = useStore(theme, (value) => value.drawn);
  const shape = props.series.map((entry) => entry.label + entry.color).join();
  const data = useMemo(
    () => [props.x, ...props.series.map((entry) => entry.values)] as uPlot.AlignedData,
    [props.x, props.series],
  );
  useEffect(() => {
    const element = host.current;
    if (!element || !hasData) return;
    const options = optionsOf(element, () => latest.current);
    const drawn = new uPlot(options, data, element);
    drawn.hooks.setCursor = [() => setHovered(drawn.cursor.idx ?? null)];
    plot.current = drawn;
    const observer = new ResizeObserver(() => drawn.setSize({ width: element.clientWidth, height: HEIGHT }));
    observer.observe(element);
    return () => {
      observer.disconnect();
      drawn.destroy();
      plot.current = null;
    };
  }, [shape, props.isTime, scheme, hasData]);
  useEffect(() => plot.current?.setData(data), [data]);
  return hovered;
}

export function Chart(props: Props) {
  const { title, series, format, empty, note } = props;
  const host = useRef<HTMLDivElement>(null);
  const hasData = series.some(isKnown);
  const hovered = usePlot(host, props, hasData);
  const shownAt = (values: (number | null)[]) =>
    hovered != null && hovered < values.length ? values[hovered] : lastKnown(values);
  const summary = series.map((entry) => `${entry.label} ${format(lastKnown(entry.values))}`).join(", ");
  return (
    <figure class="chart card">
      <figcaption>
        <h3>{title}</h3>
        <ul class="legend">
          {(hasData ? series.filter(isKnown) : series).map((entry) => (
            <li key={entry.label}>
              <i class={`swatch ${entry.color}`} />
              {entry.label} <b>{format(shownAt(entry.values))}</b>
            </li>
          ))}
        </ul>
      </figcaption>
      {hasData ? (
        <div class="plot" ref={host} role="img" aria-label={`${title}: ${summary}`} />
      ) : (
        <p class="plot empty">{empty}</p>
      )}
      {note && <p class="note">{note}</p>}
    </figure>
  );
}

function isKnown({ values }: Series): boolean {
  return values.some((value) => value != null);
}

function lastKnown(values: (number | null)[]): number | null {
  for (let index = values.length - 1; index >= 0; index--)
    if (values[index] != null) return values[index] ?? null;
  return null;
}

/** `props` gives the latest ones: uPlot draws again and again with the options of its start. */
function optionsOf(element: HTMLElement, props: () => Props): uPlot.Options {
  const { series, isTime = false, whole = false, joins = false, label = String } = props();
  const style = getComputedStyle(element);
  const color = (name: string) => style.getPropertyValue(`--${name}`).trim();
  const axis: uPlot.Axis = {
    stroke: color("muted"),
    grid: { stroke: color("line"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  const valueAxis = { ...axis, size: 58, space: 32, ...(whole && { incrs: WHOLE }) };
  return {
    width: element.clientWidth,
    height: HEIGHT,
    padding: [8, 8, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: {
      x: { time: isTime },
      y: { range: (_plot, low, high) => rangeOf(low, high) },
    },
    axes: [
      { ...axis, size: 26, ...(isTime ? { values: clockTicks, space: 70 } : stepTicks(label)) },
      { ...valueAxis, values: (_plot, ticks) => ticks.map((tick) => props().format(tick)) },
    ],
    series: [{}, ...series.map((entry) => lineOf(entry.label, color(entry.color), joins))],
    hooks: { drawClear: [(plot) => drawBand(plot, props().band, color("band"))] },
  };
}

function lineOf(label: string, color: string, spanGaps: boolean): uPlot.Series {
  const points = { show: (plot: uPlot) => plot.data[0].length < FEW_POINTS, size: 5, fill: color };
  return { label, stroke: color, width: 1.75, points, spanGaps };
}

function drawBand(plot: uPlot, band: Props["band"], color: string): void {
  if (!band) return;
  const left = Math.max(plot.valToPos(band.from, "x", true), plot.bbox.left);
  const right = Math.min(plot.valToPos(band.to, "x", true), plot.bbox.left + plot.bbox.width);
  if (right <= left) return;
  plot.ctx.fillStyle = color;
  plot.ctx.fillRect(left, plot.bbox.top, right - left, plot.bbox.height);
}

/** Zero is in sight for what is never negative, so that small changes look small. */
function rangeOf(low: number | null, high: number | null): uPlot.Range.MinMax {
  if (low == null || high == null) return [0, 1];
  const span = high - Math.min(low, 0);
  const margin = span > 0 ? span * 0.08 : 1;
  return [low >= 0 ? 0 : low - margin, high + margin];
}

/** Steps that there are; of a single one the axis begins before it and ends after it. */
function stepTicks(label: (step: number) => string): Partial<uPlot.Axis> {
  return {
    incrs: WHOLE,
    values: ({ data: [steps] }, ticks) =>
      ticks.map((tick) => (tick < steps[0]! || tick > steps[steps.length - 1]! ? "" : label(tick))),
  };
}

function clockTicks(_plot: uPlot, ticks: number[]): string[] {
  return ticks.map((tick) => new Date(tick * 1000).toLocaleTimeString("en-GB"));
}
