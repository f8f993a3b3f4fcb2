"""One claimed job's line to Redis: heartbeats, progress and events, through outages."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import redis
import structlog

from kiln_trainer.domain.errors import ClaimLost, JobCancelled
from kiln_trainer.jobs.errors import WorkerStopping
from kiln_trainer.jobs.records import Claim
from kiln_trainer.jobs.store import Event, JobStore

log = structlog.get_logger()

_MAX_PENDING_WRITES = 10_000
_FIRST_WAIT_S, _LAST_WAIT_S = 0.05, 2.0
T = TypeVar("T")

# Redis is away, is loading its file, or refuses writes for now (full, read-only).
REDIS_FAILURES = (redis.RedisError, OSError)


@dataclass(frozen=True)
class _Write:
    number: int
    fields: dict[str, str]
    events: list[Event] = field(default_factory=list)


class ClaimedJob:
    """Writes about one job while its claim lasts.

    `write` never waits for Redis: what cannot be written now is written later, in order. `sync`
    waits. The heartbeat runs on its own thread, so that a long step keeps its claim. Use as a
    context manager on the worker thread.
    """

    def __init__(self, store: JobStore, claim: Claim, stopping: threading.Event, heartbeat_s: float) -> None:
        self.claim = claim
        self._store = store
        self._stopping = stopping
        self._heartbeat_s = heartbeat_s
        self._pending: deque[_Write] = deque(maxlen=_MAX_PENDING_WRITES)
        self._num_writes = 0
        self._cancel = claim.cancel
        self._is_lost = False
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{claim.job_id}", daemon=True)
        self._is_redis_away = False  # so that one outage is one line in the log

    def __enter__(self) -> ClaimedJob:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._has_ended.set()
        self._thread.join()

    @property
    def discards_published(self) -> bool:
        """Whether the cancel that was asked for is also about what the job has published."""
        return self._cancel == "discard"

    def check(self) -> None:
        """Raise what should end the work at this step boundary.

        Raises:
            ClaimLost, JobCancelled, WorkerStopping.
        """
        self.check_claim()
        if self._cancel:
            raise JobCancelled(f"{self.claim.job_id} was cancelled")

    def check_claim(self) -> None:
        """The same for work that a cancel does not end. Raises ClaimLost, WorkerStopping."""
        if self._is_lost:
            raise ClaimLost(f"claim {self.claim.claim_epoch} of {self.claim.job_id} is not the last one")
        if self._stopping.is_set():
            raise WorkerStopping

    def write(self, fields: dict[str, str], *events: tuple[str, dict[str, Any]]) -> None:
        """Set fields and append events, now or as soon as Redis is back; then `check`."""
        self._num_writes += 1
        now_s = time.time()
        stamped = [(type_, data, now_s) for type_, data in events]
        self._pending.append(_Write(self._num_writes, fields, stamped))
        try:
            self._write_pending()
        except REDIS_FAILURES as error:
            self._note_outage(error)
        self.check()

    def sync(self) -> None:
        """Write everything that waits, and be sure that the claim still holds; waits for Redis.

        Raises:
            ClaimLost, JobCancelled, WorkerStopping.
        """
        self.patiently(self._write_pending)
        self.patiently(self._renew)
        self.check()

    def finish(self, end: Callable[[Claim], None]) -> None:
        """Write everything that waits and end the job; waits for Redis. Raises ClaimLost, WorkerStopping."""
        self.patiently(self._write_pending)
        self.patiently(lambda: end(self.claim))

    def patiently(self, call: Callable[[], T]) -> T:
        """Call until Redis answers. Raises WorkerStopping if the trainer is to stop meanwhile."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return call()
            except REDIS_FAILURES as error:
                self._note_outage(error)
            if self._stopping.wait(wait_s):
                raise WorkerStopping
            wait_s = min(2 * wait_s, _LAST_WAIT_S)

    def _write_pending(self) -> None:
        while self._pending:
            oldest = self._pending[0]
            self._note_cancel(self._store.write(self.claim, oldest.number, oldest.fields, oldest.events))
            self._pending.popleft()
            self._is_redis_away = False

    def _note_outage(self, error: Exception) -> None:
        if not self._is_redis_away:
            log.warning("job_writes_wait_for_redis", reason=str(error))
        self._is_redis_away = True

    def _renew(self) -> None:
        self._note_cancel(self._store.heartbeat(self.claim))

    def _note_cancel(self, cancel: str) -> None:
        self._cancel = cancel or self._cancel

    def _beat(self) -> None:
        while not self._has_ended.wait(self._heartbeat_s):
            try:
                self._renew()
            except ClaimLost:
                self._is_lost = True
                return
            except REDIS_FAILURES:
                continue  # nobody else can claim it either
