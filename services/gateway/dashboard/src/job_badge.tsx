import type { Job } from "./types";
import { Badge } from "./ui";

const KINDS = {
  queued: "waiting",
  running: "running",
  succeeded: "good",
  failed: "failed",
  cancelled: "quiet",
};

export function JobBadge({ job }: { job: Job }) {
  return <Badge kind={KINDS[job.status]}>{job.status}</Badge>;
}
