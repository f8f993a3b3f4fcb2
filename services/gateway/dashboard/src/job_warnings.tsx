/** What is odd about a job that was accepted, each with what to do. */
import type { Job } from "./types";

export function JobWarnings({ job }: { job: Job }) {
  return (
    <>
      {(job.warnings ?? []).map((warning) => (
        <div class="problem notice" role="note" key={warning.code}>
          <b>{warning.message}</b>
          <p>{warning.hint}</p>
        </div>
      ))}
    </>
  );
}
