/** How serving goes now: rates, latencies, memory, cache, and each request. */
import { useMemo } from "preact/hooks";
import { Chart, type Series } from "../chart";
import { latest, ratesOf, valuesOf } from "../derive";
import { feed } from "../feed";
import { bytes, clock, count, percent, rate, seconds } from "../format";
import { useStore } from "../store";
import type { RequestView, Sample, SplitPart, Status } from "../types";
import { Badge, Empty, PartsBar, Tile, type Part } from "../ui";

const SHOWN_S = 300;

export function Live() {
  const samples = useStore(feed, (state) => state.samples);
  const status = useStore(feed, (state) => state.status);
  const shown = useMemo(() => {
    const last = samples[samples.length - 1];
    return last ? samples.filter((sample) => sample.at > last.at - SHOWN_S) : [];
  }, [samples]);
  const generated = useMemo(() => ratesOf(shown, "generated_tokens_total"), [shown]);
  const last = shown[shown.length - 1];
  return (
    <>
      <EngineNotice status={status} />
      <dl class="tiles">
        <Tile
          label="Generated"
          value={`${rate(latest(generated))} tok/s`}
          detail={totalOf(last, "generated_tokens_total")}
        />
        <Tile
          label="Requests"
          value={`${count(last?.engine.running)} running`}
          detail={`${count(last?.engine.waiting)} waiting`}
        />
        <Tile
          label="First token, p50"
          value={seconds(last?.seconds.first_token_p50)}
          detail={`p99 ${seconds(last?.seconds.first_token_p99)}`}
        />
        <Tile
          label="Between tokens, p50"
          value={seconds(last?.seconds.inter_token_p50)}
          detail={`p99 ${seconds(last?.seconds.inter_token_p99)}`}
        />
      </dl>
      <Charts shown={shown} generated={generated} />
      <div class="columns">
        <Memory status={status} last={last} />
        <Cache last={last} />
      </div>
      <RequestTable />
    </>
  );
}

function totalOf(sample: Sample | undefined, name: string): string {
  return `${count(sample?.engine[name])} since the start`;
}

function EngineNotice({ status }: { status: Status }) {
  const away = status.engines.filter((engine) => engine.status === "unavailable").length;
  if (!away) return null;
  return (
    <div class="problem" role="alert">
      <b>
        {away} of {status.engines.length} engines {status.engines.length === 1 ? "does" : "do"} not answer
      </b>
      <p>Requests wait for the others, or fail until one is back. The logs say more.</p>
    </div>
  );
}

function Charts({ shown, generated }: { shown: Sample[]; generated: (number | null)[] }) {
  const drawn = useMemo(() => {
    const line = (
      label: string,
      color: string,
      of: (sample: Sample) => number | null | undefined,
    ): Series => ({
      label,
      color,
      values: valuesOf(shown, of),
    });
    return {
      x: shown.map((sample) => sample.at),
      tokens: [
        { label: "generated", color: "series-1", values: generated },
        { label: "prompt", color: "series-2", values: ratesOf(shown, "prompt_tokens_total") },
      ],
      requests: [
        line("running", "series-1", (sample) => sample.engine.running),
        line("waiting", "series-3", (sample) => sample.engine.waiting),
      ],
      first: [
        line("p50", "series-1", (sample) => sample.seconds.first_token_p50),
        line("p99", "series-3", (sample) => sample.seconds.first_token_p99),
      ],
      inter: [
        line("p50", "series-1", (sample) => sample.seconds.inter_token_p50),
        line("p99", "series-3", (sample) => sample.seconds.inter_token_p99),
      ],
    };
  }, [shown, generated]);
  const window = "At this gateway, over the 15 seconds before each point.";
  const common = { x: drawn.x, isTime: true, empty: "No answer in the last five minutes, or none while this page was open." };
  return (
    <div class="charts">
      <Chart {...common} title="Tokens per second" series={drawn.tokens} format={rate} />
      <Chart {...common} title="Requests in the engines" series={drawn.requests} format={count} whole />
      <Chart {...common} title="Time to first token" series={drawn.first} format={seconds} note={window} />
      <Chart {...common} title="Between tokens" series={drawn.inter} format={seconds} note={window} />
    </div>
  );
}

const MEMORY_PARTS: [string, string, string][] = [
  ["weights_bytes", "Weights", "series-1"],
  ["kv_bytes", "Keys and values", "series-2"],
  ["state_bytes", "States", "series-3"],
  ["adapter_bytes", "Adapters", "series-4"],
  ["workspace_bytes", "Kept for a step", "series-5"],
];

function Memory({ status, last }: { status: Status; last: Sample | undefined }) {
  const parts: Part[] = MEMORY_PARTS.map(([key, name, color]) => ({
    name,
    color,
    value: status.engines.reduce((sum, engine) => sum + (engine.memory?.[key] ?? 0), 0),
  }));
  parts.push({ name: "Trainer", color: "series-6", value: status.training?.device_bytes ?? 0 });
  // The server counts a device once, however many engines share it, and whichever of them answer.
  const device = last?.engine.device_bytes ?? 0;
  const used = parts.reduce((sum, part) => sum + part.value, 0);
  const isCpu = status.engines.every((engine) => engine.device === "cpu");
  const kv = share(last, "pages_in_use", "pages_total");
  const states = share(last, "state_slots_in_use", "state_slots_total");
  return (
    <section class="card" aria-labelledby="memory-title">
      <h2 id="memory-title">{isCpu ? "Memory" : "GPU memory"}</h2>
      <p class="lead">
        <b>{bytes(used)}</b> of {bytes(device)}
      </p>
      <PartsBar
        parts={parts}
        total={isCpu ? used : device}
        label={`Memory: ${parts.map((part) => `${part.name} ${bytes(part.value)}`).join(", ")}`}
      />
      <ul class="parts">
        {parts.map((part) => (
          <li key={part.name}>
            <i class={`swatch ${part.color}`} />
            {part.name}
            <b>{bytes(part.value)}</b>
          </li>
        ))}
      </ul>
      <p class="note">
        In use: {percent(kv)} of the pages, {percent(states)} of the state slots.
        {status.training &&
          ` The trainer borrows ${bytes(status.training.borrowed_bytes)} of the weights and holds ${bytes(status.training.allocated_base_bytes)} of its own.`}
      </p>
    </section>
  );
}

function share(sample: Sample | undefined, part: string, whole: string): number | null {
  const total = sample?.engine[whole];
  return total ? (sample?.engine[part] ?? 0) / total : null;
}

function Cache({ last }: { last: Sample | undefined }) {
  const prompt = last?.engine.prompt_tokens_total ?? 0;
  const cached = last?.engine.cached_tokens_total ?? 0;
  const lost = last?.engine.tokens_lost_for_want_of_checkpoint_total ?? 0;
  const parts: Part[] = [
    { name: "From the cache", value: cached, color: "series-2" },
    { name: "Matched, no checkpoint", value: lost, color: "series-3" },
    { name: "Computed, no match", value: Math.max(0, prompt - cached - lost), color: "rest" },
  ];
  return (
    <section class="card" aria-labelledby="cache-title">
      <h2 id="cache-title">Prefix cache</h2>
      <p class="lead">
        <b>{percent(prompt ? cached / prompt : null)}</b> of {count(prompt)} prompt tokens came from it
      </p>
      <PartsBar
        parts={parts}
        label={parts.map((part) => `${part.name}: ${count(part.value)} tokens`).join(", ")}
      />
      <ul class="parts">
        {parts.map((part) => (
          <li key={part.name}>
            <i class={`swatch ${part.color}`} />
            {part.name}
            <b>{count(part.value)}</b>
          </li>
        ))}
      </ul>
      <p class="note">
        Matched tokens are computed again where no state checkpoint was kept.{" "}
        {count(last?.engine.pages_cached)} pages and {count(last?.engine.state_slots_cached)} states are held
        for later; {count(last?.engine.preemptions_total)} preemptions.
      </p>
    </section>
  );
}

const SPLIT: [SplitPart, string, string][] = [
  ["edge", "edge", "series-5"],
  ["waiting", "not begun", "rest"],
  ["queue", "queue", "series-3"],
  ["prefill", "prefill", "series-2"],
  ["decode", "decode", "series-1"],
];

function RequestTable() {
  const requests = useStore(feed, (state) => state.requests);
  const rows = [...requests.running, ...requests.ended].slice(0, 30);
  return (
    <section class="card" aria-labelledby="requests-title">
      <div class="head">
        <h2 id="requests-title">Requests</h2>
        <ul class="legend">
          {SPLIT.map(([part, name, color]) => (
            <li key={part}>
              <i class={`swatch ${color}`} />
              {name}
            </li>
          ))}
        </ul>
      </div>
      {rows.length ? (
        <div class="table-box" tabIndex={0} role="region" aria-label="Requests">
          <table>
            <thead>
              <tr>
                <th class="spare">Began</th>
                <th>Adapter</th>
                <th class="number spare">Prompt</th>
                <th class="number spare">Cached</th>
                <th class="number">Tokens</th>
                <th>Where the time went</th>
                <th class="number">Total</th>
                <th class="spare">State</th>
              </tr>
            </thead>
            <tbody>{rows.map(row)}</tbody>
          </table>
        </div>
      ) : (
        <Empty title="No requests yet">Send one from the playground, or point an OpenAI client at /v1.</Empty>
      )}
      <p class="note">Requests of this gateway; no text is shown or kept here.</p>
    </section>
  );
}

function row(request: RequestView) {
  const parts = SPLIT.map(([part, name, color]) => ({ name, color, value: request.seconds[part] ?? 0 }));
  const total = parts.reduce((sum, part) => sum + part.value, 0);
  const words = parts
    .filter((part) => part.value > 0)
    .map((part) => `${part.name} ${seconds(part.value)}`)
    .join(", ");
  return (
    <tr key={`${request.id}/${request.index}`} title={`${request.id} · ${words}`}>
      <td class="spare">{clock(request.started_at)}</td>
      <td class="name">{request.adapter}</td>
      <td class="number spare">{count(request.prompt_tokens)}</td>
      <td class="number spare">{count(request.cached_tokens)}</td>
      <td class="number">{count(request.tokens)}</td>
      <td class="bar">
        <PartsBar parts={parts} label={words} />
      </td>
      <td class="number">{seconds(total)}</td>
      <td class="spare">
        <Badge kind={request.end === null ? "running" : request.end === "failed" ? "failed" : "quiet"}>
          {request.end ?? "running"}
        </Badge>
      </td>
    </tr>
  );
}
