/** Calls of the gateway: the key, errors as the contract writes them, and server-sent events. */

const KEY = "kiln-api-key";

export const apiKey = {
  get: (): string => sessionStorage.getItem(KEY) ?? "",
  set: (key: string): void => sessionStorage.setItem(KEY, key),
  forget: (): void => sessionStorage.removeItem(KEY),
};

export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly hint: string | null,
  ) {
    super(message);
  }
}

interface ErrorBody {
  error?: { message?: string; code?: string; hint?: string | null };
}

function toError(status: number, body: ErrorBody | null): ApiError {
  const error = body?.error;
  return new ApiError(
    status,
    error?.code ?? "unexpected_answer",
    error?.message ?? `the gateway answered with status ${status}`,
    error?.hint ?? null,
  );
}

async function send(path: string, init: RequestInit): Promise<Response> {
  const headers = new Headers(init.headers);
  const key = apiKey.get();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(
      0,
      "gateway_unreachable",
      "the gateway does not answer",
      "Look at whether it still runs.",
    );
  }
  if (!response.ok) throw toError(response.status, await response.json().catch(() => null));
  return response;
}

export async function call<T>(method: "GET" | "POST" | "DELETE", path: string, body?: unknown): Promise<T> {
  const init: RequestInit = { method };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "Content-Type": "application/json" };
  }
  return (await send(path, init)).json() as Promise<T>;
}

export interface ServerEvent {
  event: string;
  data: string;
}

/** Server-sent events of an answer. EventSource can send neither a key nor a body. */
export async function* stream(path: string, init: RequestInit): AsyncGenerator<ServerEvent> {
  const response = await send(path, init);
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split("\n\n");
      rest = blocks.pop() ?? "";
      for (const block of blocks) {
        const found = parseBlock(block);
        if (found) yield found;
      }
    }
  } finally {
    void reader.cancel().catch(() => undefined);
  }
}

function parseBlock(block: string): ServerEvent | null {
  let event = "message";
  const data: string[] = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event = line.slice(7);
    else if (line.startsWith("data: ")) data.push(line.slice(6));
  }
  return data.length ? { event, data: data.join("\n") } : null;
}

/** An error that came as an event of a stream that had begun. */
export function errorIn(body: unknown): ApiError | null {
  return typeof body === "object" && body !== null && "error" in body ? toError(0, body as ErrorBody) : null;
}

export function asApiError(error: unknown): ApiError {
  return error instanceof ApiError ? error : new ApiError(0, "page_failed", String(error), null);
}
