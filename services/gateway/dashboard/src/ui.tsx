/** Small parts that every view uses. */
import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { ApiError, asApiError } from "./api";

export function Problem({ error }: { error: ApiError | null }) {
  if (!error) return null;
  const isNotBuilt = error.status === 501;
  return (
    <div class={`problem ${isNotBuilt ? "notice" : ""}`} role="alert">
      <b>{isNotBuilt ? "Not built yet" : capital(error.message)}</b>
      {isNotBuilt && <p>{capital(error.message)}.</p>}
      {error.hint && <p>{error.hint}</p>}
      <code>{error.code}</code>
    </div>
  );
}

function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** What an action is doing, so that its button can wait and its error be shown. */
export function useAction(): {
  isBusy: boolean;
  error: ApiError | null;
  run: (action: () => Promise<unknown>) => Promise<void>;
  clear: () => void;
} {
  const [isBusy, setBusy] = useState(false);
  const [error, setError] = useState<ApiError | null>(null);
  const run = async (action: () => Promise<unknown>) => {
    setBusy(true);
    setError(null);
    try {
      await action();
    } catch (caught) {
      setError(asApiError(caught));
    } finally {
      setBusy(false);
    }
  };
  return { isBusy, error, run, clear: () => setError(null) };
}

export function Tile({ label, value, detail }: { label: string; value: string; detail?: string }) {
  return (
    <div class="tile card">
      <dt>{label}</dt>
      <dd>{value}</dd>
      {detail && <dd class="detail">{detail}</dd>}
    </div>
  );
}

export function Fact({ name, children }: { name: string; children: ComponentChildren }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

export function Badge({ kind, children }: { kind: string; children: ComponentChildren }) {
  return <span class={`badge ${kind}`}>{children}</span>;
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty-state">
      <b>{title}</b>
      {children && <p>{children}</p>}
    </div>
  );
}

export interface Part {
  name: string;
  value: number;
  color: string;
}

/** One bar cut into parts; the numbers stand beside it, the bar is for the eye. */
export function PartsBar({ parts, total, label }: { parts: Part[]; total?: number; label: string }) {
  const whole = total ?? parts.reduce((sum, part) => sum + part.value, 0);
  return (
    <div class="parts-bar" role="img" aria-label={label}>
      {parts
        .filter((part) => part.value > 0)
        .map((part) => (
          <i
            key={part.name}
            class={part.color}
            style={{ width: `${whole ? (100 * part.value) / whole : 0}%` }}
          />
        ))}
    </div>
  );
}
