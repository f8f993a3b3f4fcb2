"""Jobs in Redis: accepted in one transaction, claimed, written about under a claim, ended once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from kiln_common import tracing
from kiln_common.bus import keys
from kiln_common.errors import IdempotencyConflict, JobNotFound
from kiln_common.ids import new_id
from kiln_common.pb import trainer_pb2
from kiln_trainer.domain.errors import ClaimLost
from kiln_trainer.jobs import scripts
from kiln_trainer.jobs.errors import PayloadCorrupt
from kiln_trainer.jobs.records import Claim, JobFailure, downsample, submitted_fields, to_event, to_job

Event = tuple[str, dict[str, Any], float]
"""Type, data and time (seconds since the epoch) of something that happened to a job."""

_MAX_HISTORY_POINTS = 200
_DEFAULT_LIST_LIMIT = 100


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
                keys.job_events(job_id), keys.JOB_INDEX, keys.JOB_QUEUE,
                keys.adapter_jobs(request.config.adapter), keys.JOB_QUEUED, keys.JOB_SEQUENCE,
            ],
            args=[
                job_id, "1" if key else "", time.time(), payload,
                json.dumps({"kind": fields["kind"], "adapter": fields["adapter"]}), *_flatten(fields),
            ],
        )  # fmt: skip
        if outcome == b"conflict":
            raise IdempotencyConflict(f"the idempotency key {key[:80]!r} was used for another body")
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

    def list_jobs(self, limit: int) -> list[trainer_pb2.Job]:
        """The newest jobs first, without their histories."""
        ids = self._redis.zrevrange(keys.JOB_INDEX, 0, (limit or _DEFAULT_LIST_LIMIT) - 1)
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(keys.job(job_id.decode()))
                pipe.zrank(keys.JOB_QUEUED, job_id)
            answers = pipe.execute()
        found = zip(ids, answers[::2], answers[1::2], strict=True)
        return [to_job(job_id.decode(), fields, rank, []) for job_id, fields, rank in found if fields]

    def forget_expired(self) -> None:
        """Take ids of expired jobs off the index, and trainers not heard of for `retention_s` off the group."""
        for consumer in self._redis.xinfo_consumers(keys.JOB_QUEUE, keys.JOB_GROUP):
            if not consumer["pending"] and consumer["idle"] > 1000 * self._retention_s:
                self._redis.xgroup_delconsumer(keys.JOB_QUEUE, keys.JOB_GROUP, consumer["name"])
        # Ended jobs expire after retention_s, so only older ones can be gone.
        old = self._redis.zrangebyscore(keys.JOB_INDEX, 0, time.time() - self._retention_s)
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in old:
                pipe.exists(keys.job(job_id.decode()))
            expired = [job_id for job_id, exists in zip(old, pipe.execute(), strict=True) if not exists]
        if expired:
            self._redis.zrem(keys.JOB_INDEX, *expired)

    def status(self, job_id: str) -> str | None:
        """A job's status, None when there is no such job (any more)."""
        status = self._redis.hget(keys.job(job_id), "status")
        return None if status is None else status.decode()

    def num_queued(self) -> int:
        return self._redis.zcard(keys.JOB_QUEUED)

    def cancel(self, job_id: str) -> None:
        """End a queued job, ask a running one to end, leave one that publishes or has ended.

        Raises:
            JobNotFound: there is no such job.
        """
        outcome, *_ = self._end(job_id, "", "cancelled", {}, {})
        if outcome == b"gone":
            raise JobNotFound(f"there is no job {job_id[:80]!r}")

    def ensure_group(self) -> None:
        """Create the queue's consumer group unless it is there."""
        try:
            self._redis.xgroup_create(keys.JOB_QUEUE, keys.JOB_GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def claim_next(self, claim_timeout_s: float, wait_s: float) -> Claim | None:
        """Take over a job whose trainer went silent, else the next queued one.

        `claim_timeout_s`: silence after which a running job is taken over.
        `wait_s`: how long to wait for a job, 0 for not at all; None when none came, or only one that must wait.
        """
        for entry_id, entry in self._next_entry(claim_timeout_s, wait_s):
            job_id, adapter = entry[b"job_id"].decode(), entry[b"adapter"].decode()
            outcome = self._claim(
                keys=[
                    keys.job(job_id), keys.JOB_QUEUE, keys.adapter_jobs(adapter), keys.JOB_QUEUED,
                    keys.job_events(job_id),
                ],
                args=[job_id, entry_id, keys.JOB_GROUP, self._trainer_id, time.time()],
            )  # fmt: skip
            if outcome[0] == b"claimed":
                return self._read_claim(job_id, adapter, entry_id.decode(), outcome[1])
        return None

    def read_payload(self, claim: Claim) -> trainer_pb2.SubmitRequest:
        """The request as it was accepted. Raises PayloadCorrupt."""
        payload = self._redis.get(keys.job_payload(claim.job_id)) or b""
        accepted = self._redis.hget(keys.job(claim.job_id), "payload_sha256") or b""
        found = hashlib.sha256(payload).hexdigest()
        if found != accepted.decode():
            raise PayloadCorrupt(f"the payload of {claim.job_id} has {len(payload)} bytes of hash {found}")
        return trainer_pb2.SubmitRequest.FromString(payload)

    def heartbeat(self, claim: Claim) -> bool:
        """Renew the claim; returns whether the job is to be cancelled. Raises ClaimLost."""
        return _is_cancel_requested(claim, self._heartbeat(
            keys=[keys.job(claim.job_id), keys.JOB_QUEUE],
            args=[claim.claim_epoch, keys.JOB_GROUP, self._trainer_id, claim.entry_id],
        ))  # fmt: skip

    def write(
        self, claim: Claim, write_number: int, fields: Mapping[str, str], events: Sequence[Event]
    ) -> bool:
        """Set fields and append events; returns whether the job is to be cancelled.

        A `write_number` not above the claim's last one was written before and does nothing.

        Raises:
            ClaimLost: a later claim exists; nothing was written.
        """
        flat_events = [part for type_, data, at_s in events for part in (type_, json.dumps(data), at_s)]
        return _is_cancel_requested(claim, self._write(
            keys=[keys.job(claim.job_id), keys.job_events(claim.job_id)],
            args=[claim.claim_epoch, write_number, len(fields), *_flatten(fields), *flat_events],
        ))  # fmt: skip

    def succeed(self, claim: Claim, result: dict[str, Any]) -> None:
        """End the job well. Raises ClaimLost."""
        self._end_claimed(claim, "succeeded", {"result": json.dumps(result)}, result)

    def fail(self, claim: Claim, failure: JobFailure) -> None:
        """End the job badly. Raises ClaimLost."""
        error = {"code": failure.code, "message": failure.message, "hint": failure.hint}
        self._end_claimed(claim, "failed", {"error": json.dumps(error)}, error)

    def end_cancelled(self, claim: Claim) -> None:
        """End a job that was asked to. Raises ClaimLost."""
        self._end_claimed(claim, "cancelled", {}, {})

    def release(self, claim: Claim) -> None:
        """Give the claim back, so that any trainer can go on with the job at once."""
        self._release(
            keys=[keys.job(claim.job_id), keys.JOB_QUEUE],
            args=[claim.claim_epoch, keys.JOB_GROUP, self._trainer_id, claim.entry_id],
        )

    def _next_entry(self, claim_timeout_s: float, wait_s: float) -> list[tuple[bytes, dict[bytes, bytes]]]:
        silent_ms, cursor = int(claim_timeout_s * 1000), b"0-0"
        while True:  # each call looks at a few of the entries handed out
            cursor, orphans, *_ = self._redis.xautoclaim(
                keys.JOB_QUEUE, keys.JOB_GROUP, self._trainer_id, silent_ms, cursor, count=1
            )
            if orphans:
                return orphans
            if cursor == b"0-0":
                break
        # Redis takes 0 for ever, and no number for not at all.
        wait_ms = int(wait_s * 1000) or None
        fresh = self._redis.xreadgroup(
            keys.JOB_GROUP, self._trainer_id, {keys.JOB_QUEUE: ">"}, count=1, block=wait_ms
        )
        return fresh[0][1] if fresh else []

    def _read_claim(self, job_id: str, adapter: str, entry_id: str, claim_epoch: int) -> Claim:
        num_crashes, cancel, base, created_s, traceparent = self._redis.hmget(
            keys.job(job_id),
            "num_crashes",
            "cancel_requested",
            "resolved_base",
            "created_at_s",
            "traceparent",
        )
        return Claim(
            job_id=job_id,
            adapter=adapter,
            claim_epoch=claim_epoch,
            entry_id=entry_id,
            num_crashes=int(num_crashes),
            is_cancel_requested=bool(cancel),
            resolved_base=None if base is None else base.decode(),
            created_at_s=float(created_s),
            traceparent=(traceparent or b"").decode(),
        )

    def _end_claimed(
        self, claim: Claim, status: str, fields: Mapping[str, str], data: dict[str, Any]
    ) -> None:
        outcome, *found = self._end(claim.job_id, str(claim.claim_epoch), status, fields, data)
        # The answer to an earlier try may have been lost: this claim's own end is found again.
        ended_before = outcome == b"final" and found == [status.encode(), str(claim.claim_epoch).encode()]
        if outcome != b"done" and not ended_before:
            raise ClaimLost(f"claim {claim.claim_epoch} of {claim.job_id} is not the last one")

    def _end(
        self, job_id: str, epoch: str, status: str, fields: Mapping[str, str], data: dict[str, Any]
    ) -> list[bytes]:
        adapter, key = self._redis.hmget(keys.job(job_id), "adapter", "idempotency_key")
        return self._finish(
            keys=[
                keys.job(job_id), keys.job_events(job_id), keys.JOB_QUEUE,
                keys.adapter_jobs((adapter or b"").decode()), keys.JOB_QUEUED, keys.job_payload(job_id),
                keys.job_idempotency((key or b"").decode()),
            ],
            args=[
                epoch, job_id, status, time.time(), keys.JOB_GROUP, self._retention_s,
                json.dumps(data), *_flatten(fields),
            ],
        )  # fmt: skip


def _serialise(request: trainer_pb2.SubmitRequest) -> tuple[bytes, str]:
    payload = request.SerializeToString(deterministic=True)
    return payload, hashlib.sha256(payload).hexdigest()


def _flatten(fields: Mapping[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


def _is_cancel_requested(claim: Claim, answer: Sequence[bytes]) -> bool:
    if answer[0] != b"ok":
        raise ClaimLost(f"claim {claim.claim_epoch} of {claim.job_id} is not the last one")
    return bool(answer[1])
