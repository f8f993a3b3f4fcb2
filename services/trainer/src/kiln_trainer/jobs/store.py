"""Jobs in Redis: accepted in one transaction, claimed, written about under a claim, ended once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import redis

from kiln_common import tracing
from kiln_common.bus import keys
from kiln_common.errors import IdempotencyConflict, JobNotFound
from kiln_common.ids import new_id
from kiln_common.pb import trainer_pb2
from kiln_trainer.domain.errors import ClaimLost
from kiln_trainer.jobs import scripts
from kiln_trainer.jobs.errors import CorrectionsTaken, PayloadCorrupt, PayloadGone
from kiln_trainer.jobs.records import (
    FINAL_STATUSES,
    Claim,
    JobFailure,
    Published,
    downsample,
    submitted_fields,
    to_event,
    to_job,
)

Event = tuple[str, dict[str, Any], float]
"""Type, data and time (seconds since the epoch) of something that happened to a job."""

_MAX_HISTORY_POINTS = 200
_DEFAULT_LIST_LIMIT = 100
_LIST_PAGE = 200
_MOST_ADOPTED = 1000


class JobStore:
    """The queue and every job's state, over one synchronous client. Thread-safe.

    Any method may raise what redis-py raises when the server is away; each may then be repeated.
    `retention_s`: how long an ended job can still be read.
    """

    def __init__(self, client: redis.Redis, trainer_id: str, *, retention_s: int) -> None:
        self._redis: Any = client
        self._trainer_id = trainer_id
        self._retention_s = retention_s
        self._submit = self._redis.register_script(scripts.SUBMIT)
        self._claim = self._redis.register_script(scripts.CLAIM)
        self._heartbeat = self._redis.register_script(scripts.HEARTBEAT)
        self._write = self._redis.register_script(scripts.WRITE)
        self._finish = self._redis.register_script(scripts.FINISH)
        self._release = self._redis.register_script(scripts.RELEASE)

    def submit(self, request: trainer_pb2.SubmitRequest, job_id: str | None = None) -> str:
        """Accept a job; when this returns, Redis has it on disk. Returns its id.

        Repeating a call whose answer was lost needs the same `job_id` or idempotency key.

        Raises:
            IdempotencyConflict: the key was used for another payload.
            CorrectionsTaken: another job has one of the corrections, or it is gone.
        """
        job_id = job_id or new_id("job")
        payload, payload_sha256 = _serialise(request)
        fields = submitted_fields(request, payload_sha256)
        if traceparent := tracing.current_traceparent():
            fields["traceparent"] = traceparent
        key = request.idempotency_key
        outcome, found_id = self._submit(
            keys=[
                keys.job_idempotency(key), keys.job(job_id), keys.job_payload(job_id),
                keys.job_events(job_id), keys.JOB_INDEX, keys.adapter_jobs(request.config.adapter),
                keys.JOB_QUEUED, keys.JOB_SEQUENCE, keys.JOB_TURNS,
            ],
            args=[
                job_id, "1" if key else "", time.time(), payload,
                json.dumps({"kind": fields["kind"], "adapter": fields["adapter"]}),
                request.config.priority, request.owner, ",".join(request.correction_ids),
                "" if request.retry_of else "1", *_flatten(fields),
            ],
        )  # fmt: skip
        if outcome == b"conflict":
            raise IdempotencyConflict(f"the idempotency key {key[:80]!r} was used for another body")
        if outcome == b"taken":
            raise CorrectionsTaken(f"the correction {found_id.decode()!r} is not free", param="corrections")
        return found_id.decode()

    def get(self, job_id: str) -> trainer_pb2.Job:
        """One job with its history. Raises JobNotFound."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.job(job_id))
            pipe.zrank(keys.JOB_QUEUED, job_id)
            pipe.xrange(keys.job_events(job_id))
            fields, position, entries = pipe.execute()
        if not fields:
            raise JobNotFound(f"there is no job {job_id[:80]!r}")
        events = [to_event(event_id, entry) for event_id, entry in entries]
        return to_job(job_id, fields, position, downsample(events, _MAX_HISTORY_POINTS))

    def list_jobs(
        self, limit: int, statuses: Collection[str] = (), owner: str | None = None
    ) -> list[trainer_pb2.Job]:
        """The newest jobs first, without their histories; those of `statuses`, of `owner`, or all."""
        limit = limit or _DEFAULT_LIST_LIMIT
        found: list[trainer_pb2.Job] = []
        for start in range(0, self._redis.zcard(keys.JOB_INDEX), _LIST_PAGE):
            ids = self._redis.zrevrange(keys.JOB_INDEX, start, start + _LIST_PAGE - 1)
            found += [
                job
                for job in self._read(ids)
                if (not statuses or job.status in statuses) and owner in (None, job.owner)
            ]
            if len(found) >= limit:
                break
        return found[:limit]

    def list_open(self) -> list[trainer_pb2.Job]:
        """The running jobs, then the queued ones in the order in which they will run."""
        running = self._redis.zrange(keys.JOB_RUNNING, 0, -1)
        jobs = self._read([*running, *self._redis.zrange(keys.JOB_QUEUED, 0, -1)])
        # A job that was claimed between the two reads is there twice, one that ended not at all.
        by_id = {job.id: job for job in jobs if job.status not in FINAL_STATUSES}
        return sorted(by_id.values(), key=lambda job: (job.status != "running", job.queue_position))

    def _read(self, ids: Sequence[bytes]) -> list[trainer_pb2.Job]:
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(keys.job(job_id.decode()))
                pipe.zrank(keys.JOB_QUEUED, job_id)
            answers = pipe.execute()
        found = zip(ids, answers[::2], answers[1::2], strict=True)
        return [to_job(job_id.decode(), fields, rank, []) for job_id, fields, rank in found if fields]

    def forget_expired(self) -> None:
        """Take ids of expired jobs off the index."""
        # Ended jobs expire after retention_s, so only older ones can be gone.
        old = self._redis.zrangebyscore(keys.JOB_INDEX, 0, time.time() - self._retention_s)
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in old:
                pipe.exists(keys.job(job_id.decode()))
            expired = [job_id for job_id, exists in zip(old, pipe.execute(), strict=True) if not exists]
        if expired:
            self._redis.zrem(keys.JOB_INDEX, *expired)

    def adopt_from_stream(self) -> None:
        """Take over what an earlier Kiln, whose queue was a stream, has left running. Safe to repeat."""
        if not self._redis.exists(keys.FORMER_JOB_QUEUE):
            return
        running = {job.id: 0 for job in self.list_jobs(_MOST_ADOPTED, ["running"])}
        if running:
            self._redis.zadd(keys.JOB_RUNNING, running, nx=True)
        self._redis.delete(keys.FORMER_JOB_QUEUE)

    def status(self, job_id: str) -> str | None:
        """A job's status, None when there is no such job (any more)."""
        status = self._redis.hget(keys.job(job_id), "status")
        return None if status is None else status.decode()

    def correction_owner(self, correction_id: str) -> str | None:
        """Whose correction it is; None when there is no such correction (any more)."""
        owner = self._redis.hget(keys.correction(correction_id), "owner")
        return None if owner is None else owner.decode()

    def num_queued(self) -> int:
        return self._redis.zcard(keys.JOB_QUEUED)

    def cancel(self, job_id: str, *, discards: bool = False) -> None:
        """End a queued job, ask a running one to end, leave one that publishes its result or has ended.

        `discards`: delete what the job has published on the way.

        Raises:
            JobNotFound: there is no such job.
        """
        cancel = "discard" if discards else "keep"
        outcome, *_ = self._end(job_id, "", "cancelled", {}, {}, cancel)
        if outcome == b"gone":
            raise JobNotFound(f"there is no job {job_id[:80]!r}")

    def claim_next(self, claim_timeout_s: float, wait_s: float) -> Claim | None:
        """Take over a job whose trainer went silent, else the first that may run.

        `claim_timeout_s`: silence after which a running job is taken over.
        `wait_s`: how long to wait for a job, 0 for not at all; None when none came.
        """
        claim = self._claim_now(claim_timeout_s)
        if claim is None and wait_s and self._redis.blpop([keys.JOB_WAKE], wait_s):
            claim = self._claim_now(claim_timeout_s)
        return claim

    def _claim_now(self, claim_timeout_s: float) -> Claim | None:
        outcome, *found = self._claim(
            keys=[keys.JOB_RUNNING, keys.JOB_QUEUED, keys.JOB_TURNS],
            args=[claim_timeout_s, self._trainer_id, time.time()],
        )
        if outcome != b"claimed":
            return None
        job_id, claim_epoch, adapter, num_crashes, cancel, base, published = found
        created_s, traceparent = self._redis.hmget(keys.job(job_id.decode()), "created_at_s", "traceparent")
        return Claim(
            job_id=job_id.decode(),
            adapter=adapter.decode(),
            claim_epoch=claim_epoch,
            num_crashes=int(num_crashes),
            cancel=(cancel or b"").decode(),
            resolved_base=None if base is None else base.decode(),
            published=Published.from_json((published or b"").decode()),
            created_at_s=float(created_s or 0),
            traceparent=(traceparent or b"").decode(),
        )

    def read_payload(self, job_id: str) -> trainer_pb2.SubmitRequest:
        """The request as it was accepted.

        Raises:
            PayloadGone: an ended job's data had to make room.
            PayloadCorrupt: these are not the bytes that were accepted.
        """
        payload, accepted = self._redis.get(keys.job_payload(job_id)), self._payload_sha256(job_id)
        if payload is None and self.status(job_id) in FINAL_STATUSES:
            raise PayloadGone(f"the data of {job_id} is not kept any more")
        found = hashlib.sha256(payload or b"").hexdigest()
        if found != accepted:
            raise PayloadCorrupt(f"the payload of {job_id} has {len(payload or b'')} bytes of hash {found}")
        return trainer_pb2.SubmitRequest.FromString(payload)

    def _payload_sha256(self, job_id: str) -> str:
        return (self._redis.hget(keys.job(job_id), "payload_sha256") or b"").decode()

    def heartbeat(self, claim: Claim) -> str:
        """Renew the claim; returns how the job is to be cancelled, as in Claim. Raises ClaimLost."""
        return _cancel_of(claim, self._heartbeat(
            keys=[keys.job(claim.job_id), keys.JOB_RUNNING], args=[claim.claim_epoch, claim.job_id],
        ))  # fmt: skip

    def write(
        self, claim: Claim, write_number: int, fields: Mapping[str, str], events: Sequence[Event]
    ) -> str:
        """Set fields and append events; returns how the job is to be cancelled, as in Claim.

        A `write_number` not above the claim's last one was written before and does nothing.

        Raises:
            ClaimLost: a later claim exists; nothing was written.
        """
        flat_events = [part for type_, data, at_s in events for part in (type_, json.dumps(data), at_s)]
        return _cancel_of(claim, self._write(
            keys=[keys.job(claim.job_id), keys.job_events(claim.job_id)],
            args=[claim.claim_epoch, write_number, len(fields), *_flatten(fields), *flat_events],
        ))  # fmt: skip

    def succeed(self, claim: Claim, result: dict[str, Any]) -> None:
        """End the job well; its corrections are used up if its adapter has learned them. Raises ClaimLost."""
        has_published = result.get("adapter") == claim.adapter or bool(claim.published.versions)
        self._end_claimed(
            claim, "succeeded", {"result": json.dumps(result)}, result, uses_corrections=has_published
        )

    def fail(self, claim: Claim, failure: JobFailure) -> None:
        """End the job badly. Raises ClaimLost."""
        error = {"code": failure.code, "message": failure.message, "hint": failure.hint}
        self._end_claimed(claim, "failed", {"error": json.dumps(error)}, error)

    def end_cancelled(self, claim: Claim) -> None:
        """End a job that was asked to. Raises ClaimLost."""
        self._end_claimed(claim, "cancelled", {}, {})

    def release(self, claim: Claim) -> None:
        """Give the claim back, so that any trainer can go on with the job at once."""
        self._release(keys=[keys.job(claim.job_id), keys.JOB_RUNNING], args=[claim.claim_epoch, claim.job_id])

    def _end_claimed(
        self,
        claim: Claim,
        status: str,
        fields: Mapping[str, str],
        data: dict[str, Any],
        *,
        uses_corrections: bool = False,
    ) -> None:
        epoch = str(claim.claim_epoch)
        outcome, *found = self._end(
            claim.job_id, epoch, status, fields, data, uses_corrections=uses_corrections
        )
        # The answer to an earlier try may have been lost: this claim's own end is found again.
        ended_before = outcome == b"final" and found == [status.encode(), epoch.encode()]
        if outcome != b"done" and not ended_before:
            raise ClaimLost(f"claim {claim.claim_epoch} of {claim.job_id} is not the last one")

    def _end(
        self,
        job_id: str,
        epoch: str,
        status: str,
        fields: Mapping[str, str],
        data: dict[str, Any],
        cancel: str = "",
        *,
        uses_corrections: bool = False,
    ) -> list[bytes]:
        adapter, key = self._redis.hmget(keys.job(job_id), "adapter", "idempotency_key")
        return self._finish(
            keys=[
                keys.job(job_id), keys.job_events(job_id), keys.JOB_RUNNING,
                keys.adapter_jobs((adapter or b"").decode()), keys.JOB_QUEUED, keys.job_payload(job_id),
                keys.job_idempotency((key or b"").decode()),
            ],
            args=[
                epoch, job_id, status, time.time(), self._retention_s, json.dumps(data), cancel,
                "1" if uses_corrections else "", *_flatten(fields),
            ],
        )  # fmt: skip


def _serialise(request: trainer_pb2.SubmitRequest) -> tuple[bytes, str]:
    payload = request.SerializeToString(deterministic=True)
    return payload, hashlib.sha256(payload).hexdigest()


def _flatten(fields: Mapping[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


def _cancel_of(claim: Claim, answer: Sequence[bytes]) -> str:
    if answer[0] != b"ok":
        raise ClaimLost(f"claim {claim.claim_epoch} of {claim.job_id} is not the last one")
    return answer[1].decode()
