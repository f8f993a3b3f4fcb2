/** The one connection to the gateway that keeps everything on the page current. */
import { ApiError, asApiError, stream } from "./api";
import { Store } from "./store";
import type { Adapter, Hello, Job, LogLine, Requests, Sample, Status } from "./types";

const SAMPLES_KEPT = 600;
const LOG_LINES_KEPT = 1000;
const RETRY_MS = 1500;

export type Connection = "connecting" | "live" | "lost" | "key needed";

export interface FeedState {
  connection: Connection;
  error: ApiError | null;
  hello: Hello | null;
  samples: Sample[];
  requests: Requests;
  status: Status;
  jobs: Job[];
  adapters: Adapter[];
  logs: LogLine[];
}

/** Everything a key was shown. A connection brings all of it anew, for its own key. */
const nothing = {
  hello: null,
  samples: [],
  requests: { running: [], ended: [] },
  status: { engines: [], training: null },
  jobs: [],
  adapters: [],
  logs: [],
};

export const feed = new Store<FeedState>({ connection: "connecting", error: null, ...nothing });

let connection = new AbortController();

/** Connect, and again whenever the connection breaks; a second call starts anew (with another key). */
export async function connect(): Promise<void> {
  connection.abort();
  connection = new AbortController();
  const { signal } = connection;
  while (!signal.aborted) {
    try {
      for await (const { event, data } of stream("/v1/events", { signal })) take(event, data);
      if (!signal.aborted) feed.update({ connection: "lost" });
    } catch (caught) {
      if (signal.aborted) return;
      const error = asApiError(caught);
      if (error.status === 401) {
        feed.set({ connection: "key needed", error, ...nothing });
        return;
      }
      feed.update({ connection: "lost", error });
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

function take(event: string, data: string): void {
  const body: unknown = JSON.parse(data);
  const state = feed.value;
  if (event === "hello") {
    const hello = body as Hello;
    feed.set({ connection: "live", error: null, ...nothing, hello, samples: hello.history });
  } else if (event === "sample") {
    feed.update({ samples: [...state.samples, body as Sample].slice(-SAMPLES_KEPT) });
  } else if (event === "requests") {
    feed.update({ requests: body as Requests });
  } else if (event === "status") {
    feed.update({ status: body as Status });
  } else if (event === "adapters") {
    feed.update({ adapters: body as Adapter[] });
  } else if (event === "jobs") {
    takeJobs(body as Job[]);
  } else if (event === "logs") {
    takeLogs(body as LogLine[]);
  }
}

/** Jobs come when they changed. A list has no curves of ended jobs: those known are kept. */
export function takeJobs(changed: Job[]): void {
  const known = new Map(feed.value.jobs.map((job) => [job.id, job]));
  for (const job of changed) {
    const before = known.get(job.id);
    const history = job.history.length ? job.history : (before?.history ?? []);
    known.set(job.id, { ...job, history });
  }
  const jobs = [...known.values()].sort((a, b) => (b.created_at ?? 0) - (a.created_at ?? 0));
  feed.update({ jobs });
}

let lineNumber = 0;

function takeLogs(lines: LogLine[]): void {
  const numbered = lines.map((line) => ({ ...line, number: ++lineNumber }));
  feed.update({ logs: [...feed.value.logs, ...numbered].slice(-LOG_LINES_KEPT) });
}
