import type { Job } from "./types";
import { Badge } from "./ui";

const KINDS = {
  queued: "waiting",
  running: "running",
  succeeded: "good",
  failed: "failed",
  cancelled: "quiet",
};

/** Whether the job's result did not pass its gate: then the adapter goes on meaning what it meant. */
export function isHeldBack(job: Job): boolean {
  return job.result?.gate?.passed === false;
}

export function JobBadge({ job }: { job: Job }) {
  if (isHeldBack(job)) return <Badge kind="warning">held back</Badge>;
  return <Badge kind={KINDS[job.status]}>{job.status}</Badge>;
}
