"""Follows a job's events until it has ended."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import redis.asyncio

from kiln_common.bus import keys
from kiln_common.errors import InvalidValue, JobNotFound
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.records import FINAL_STATUSES, to_event

_EVENT_ID = re.compile(r"\d{1,20}-\d{1,20}")
_BLOCK_MS = 1000
_MAX_BATCH = 500


async def watch_events(
    client: redis.asyncio.Redis, job_id: str, after_event_id: str
) -> AsyncIterator[trainer_pb2.JobEvent]:
    """Events after `after_event_id` (all when empty), then new ones until the job has ended.

    Raises:
        JobNotFound, InvalidValue (after_event_id is not an event id); what redis-py raises when the
        server is away: the caller comes back with the last id it has seen.
    """
    if after_event_id and not _EVENT_ID.fullmatch(after_event_id):
        raise InvalidValue(f"{after_event_id[:60]!r} is not an event id", param="after_event_id")
    last_id = after_event_id or "0-0"
    reader: Any = client
    while True:
        # Read before the events: once the status is final, no event comes after those read next.
        status = await reader.hget(keys.job(job_id), "status")
        if status is None:
            raise JobNotFound(f"there is no job {job_id[:80]!r}")
        has_ended = status.decode() in FINAL_STATUSES
        answer = await reader.xread(
            {keys.job_events(job_id): last_id}, count=_MAX_BATCH, block=None if has_ended else _BLOCK_MS
        )
        entries = answer[0][1] if answer else []
        for event_id, fields in entries:
            event = to_event(event_id, fields)
            last_id = event.id
            yield event
            if event.type in FINAL_STATUSES:
                return
        if has_ended and not entries:
            return
