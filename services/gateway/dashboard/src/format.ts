/** Numbers as people read them. */

const DASH = "–";

export function seconds(value: number | null | undefined): string {
  if (value == null || !Number.isFinite(value)) return DASH;
  if (value === 0) return "0 s";
  if (value < 0.00095) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 0.0095) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.95) return `${(value * 1e3).toFixed(0)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
}

export function bytes(value: number | null | undefined): string {
  if (value == null) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value < 10 && unit > 0 ? value.toFixed(1) : value.toFixed(0)} ${units[unit]}`;
}

export function count(value: number | null | undefined): string {
  if (value == null || !Number.isFinite(value)) return DASH;
  if (Math.abs(value) >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  return Math.round(value).toLocaleString("en");
}

export function rate(value: number | null | undefined): string {
  if (value == null || !Number.isFinite(value)) return DASH;
  return value >= 100 ? count(value) : value.toFixed(value >= 10 || value === 0 ? 0 : 1);
}

export function percent(value: number | null | undefined): string {
  if (value == null || !Number.isFinite(value)) return DASH;
  return `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
}

/** A metric of training: three digits that count. */
export function metric(value: number | null | undefined): string {
  if (value == null || !Number.isFinite(value)) return DASH;
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

export function clock(at: number | null | undefined): string {
  return at == null ? DASH : new Date(at * 1000).toLocaleTimeString("en-GB");
}

export function ago(at: number | null | undefined): string {
  if (at == null) return DASH;
  const passed = Date.now() / 1000 - at;
  if (passed < 10) return "just now";
  if (passed < 60) return `${Math.round(passed)} s ago`;
  if (passed < 3600) return `${Math.round(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.round(passed / 3600)} h ago`;
  return new Date(at * 1000).toLocaleDateString("en-GB");
}
