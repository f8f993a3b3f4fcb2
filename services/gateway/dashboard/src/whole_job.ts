/** The feed brings the curves of running jobs; those of ended ones are fetched once. */
import { useEffect } from "preact/hooks";
import { call } from "./api";
import { takeJobs } from "./feed";
import type { Job } from "./types";
import { useAction } from "./ui";

export function isOver(job: Job): boolean {
  return job.status !== "queued" && job.status !== "running";
}

export function useWholeJob(job: Job): ReturnType<typeof useAction> {
  const action = useAction();
  useEffect(() => {
    if (!isOver(job)) return;
    void action.run(async () =>
      takeJobs([await call<Job>("GET", `/v1/train/jobs/${encodeURIComponent(job.id)}`)]),
    );
  }, [job.id, isOver(job)]);
  return action;
}
