/** Moving the default adapter. */
import { call } from "./api";
import type { AdapterDiff } from "./types";

export function attach(name: string, version: number): Promise<unknown> {
  return call("POST", `/v1/adapters/${encodeURIComponent(name)}/attach`, { version });
}

export function rollBack(name: string, version: number): Promise<unknown> {
  return call("POST", `/v1/adapters/${encodeURIComponent(name)}/rollback`, { version });
}

export function detach(): Promise<unknown> {
  return call("POST", "/v1/adapters/detach");
}

export function diff(name: string, from: number, to: number): Promise<AdapterDiff> {
  return call("GET", `/v1/adapters/${encodeURIComponent(name)}/diff?from=${from}&to=${to}`);
}

/** "name@3" as ["name", 3]; null for "base" and for compositions. */
export function parseReference(reference: string): [string, number] | null {
  const found = /^([^@,]+)@(\d+)$/.exec(reference);
  return found ? [found[1]!, Number(found[2])] : null;
}
