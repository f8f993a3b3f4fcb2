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
  /** Values are whole numbers, and so are the ticks. */
  whole?: boolean;
  /** A stretch of x to mark. */
  band?: { from: number; to: number; label: string };
  empty: string;
  note?: string;
}

const HEIGHT = 150;
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];

export function Chart({ title, x, series, format, isTime = false, whole = false, band, empty, note }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const [hovered, setHovered] = useState<number | null>(null);
  const scheme = useStore(theme, (value) => value.drawn);
  const shape = series.map((entry) => entry.label + entry.color).join();
  const hasData = series.some((entry) => entry.values.some((value) => value != null));
  const bandRef = useRef(band);
  bandRef.current = band;
  const formatRef = useRef(format);
  formatRef.current = format;
  const data = useMemo(() => [x, ...series.map((entry) => entry.values)] as uPlot.AlignedData, [x, series]);

  useEffect(() => {
    if (!host.current || !hasData) return;
    const element = host.current;
    const options = optionsOf(element, series, { isTime, whole }, (value) => formatRef.current(value), () => bandRef.current);
    options.hooks = {
      ...options.hooks,
      setCursor: [(drawn) => setHovered(drawn.cursor.idx ?? null)],
    };
    const drawn = new uPlot(options, data, element);
    plot.current = drawn;
    const observer = new ResizeObserver(() => drawn.setSize({ width: element.clientWidth, height: HEIGHT }));
    observer.observe(element);
    return () => {
      observer.disconnect();
      drawn.destroy();
      plot.current = null;
    };
  }, [shape, isTime, scheme, hasData]);

  useEffect(() => plot.current?.setData(data), [data]);

  const shownAt = (values: (number | null)[]) =>
    hovered != null && hovered < values.length ? values[hovered] : lastKnown(values);
  const summary = series.map((entry) => `${entry.label} ${format(lastKnown(entry.values))}`).join(", ");
  return (
    <figure class="chart card">
      <figcaption>
        <h3>{title}</h3>
        <ul class="legend">
          {series.map((entry) => (
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

function lastKnown(values: (number | null)[]): number | null {
  for (let index = values.length - 1; index >= 0; index--) if (values[index] != null) return values[index] ?? null;
  return null;
}

function optionsOf(
  element: HTMLElement,
  series: Series[],
  { isTime, whole }: { isTime: boolean; whole: boolean },
  format: (value: number) => string,
  band: () => Props["band"],
): uPlot.Options {
  const style = getComputedStyle(element);
  const color = (name: string) => style.getPropertyValue(`--${name}`).trim();
  const isSparse = series.every((entry) => entry.values.length < 40);
  const axis: uPlot.Axis = {
    stroke: color("muted"),
    grid: { stroke: color("line"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
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
      { ...axis, size: 26, ...(isTime ? { values: clockTicks, space: 70 } : { incrs: WHOLE }) },
      { ...axis, size: 58, space: 32, ...(whole && { incrs: WHOLE }), values: (_plot, ticks) => ticks.map((tick) => format(tick)) },
    ],
    series: [
      {},
      ...series.map((entry) => ({
        label: entry.label,
        stroke: color(entry.color),
        width: 1.75,
        points: { show: isSparse, size: 5, fill: color(entry.color) },
        spanGaps: false,
      })),
    ],
    hooks: {
      drawClear: [
        (plot) => {
          const marked = band();
          if (!marked) return;
          const left = Math.max(plot.valToPos(marked.from, "x", true), plot.bbox.left);
          const right = Math.min(plot.valToPos(marked.to, "x", true), plot.bbox.left + plot.bbox.width);
          if (right <= left) return;
          plot.ctx.fillStyle = color("band");
          plot.ctx.fillRect(left, plot.bbox.top, right - left, plot.bbox.height);
        },
      ],
    },
  };
}

/** Zero is in sight for what is never negative, so that small changes look small. */
function rangeOf(low: number | null, high: number | null): uPlot.Range.MinMax {
  if (low == null || high == null) return [0, 1];
  const span = high - Math.min(low, 0);
  const margin = span > 0 ? span * 0.08 : 1;
  return [low >= 0 ? 0 : low - margin, high + margin];
}

function clockTicks(_plot: uPlot, ticks: number[]): string[] {
  return ticks.map((tick) => new Date(tick * 1000).toLocaleTimeString("en-GB"));
}
