"""Requests under way and those that just ended, with where each one's time went."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from kiln_gateway.insight.latency_window import LatencyWindow

# When the HTTP request arrived that is being answered (time.monotonic); set at the edge.
arrived_at: ContextVar[float] = ContextVar("arrived_at")

_WINDOW_S = 15
_ENDED_KEPT = 60


@dataclass(slots=True)
class RequestTrace:
    """One choice of one request. Times are of time.monotonic, durations in seconds."""

    completion_id: str
    index: int
    owner: str
    adapter: str
    num_prompt_tokens: int
    arrived_at: float
    submitted_at: float
    num_cached_tokens: int = 0
    num_tokens: int = 0
    queue_s: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    ended_at: float = 0.0
    end: str = ""  # the finish reason, "cancelled" or "failed"; empty while it runs
    started_s: float = field(default_factory=time.time)

    def split(self, now: float) -> dict[str, float]:
        """Seconds so far: in the queue, in prefill, in decoding, and at the gateway itself.

        Which part of the time before the first token was spent in the queue is known with that
        token; until then it is all "waiting".
        """
        end = self.ended_at or now
        before_submit = self.submitted_at - self.arrived_at
        if not self.first_token_at:
            return {"edge": before_submit, "waiting": end - self.submitted_at}
        before_first = self.first_token_at - self.submitted_at
        queue = min(self.queue_s, before_first)
        last = self.last_token_at if self.ended_at else end
        return {
            "edge": before_submit + end - last,
            "queue": queue,
            "prefill": before_first - queue,
            "decode": last - self.first_token_at,
        }

    def view(self, now: float) -> dict[str, Any]:
        """As clients see it."""
        return {
            "id": self.completion_id,
            "index": self.index,
            "adapter": self.adapter,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "tokens": self.num_tokens,
            "started_at": round(self.started_s, 3),
            "end": self.end or None,
            "seconds": {name: round(value, 5) for name, value in self.split(now).items()},
        }


class LiveRequests:
    """What this gateway is answering. Nothing of a prompt or an answer is held, only counts and times."""

    def __init__(self) -> None:
        self._running: dict[int, RequestTrace] = {}
        self._ended: deque[RequestTrace] = deque(maxlen=_ENDED_KEPT)
        self._first_token = LatencyWindow(_WINDOW_S)
        self._inter_token = LatencyWindow(_WINDOW_S)

    @contextlib.contextmanager
    def following(
        self, completion_id: str, index: int, owner: str, adapter: str, num_prompt_tokens: int
    ) -> Iterator[RequestTrace]:
        """The trace of a choice that is submitted now; its end is the block's."""
        now = time.monotonic()
        trace = RequestTrace(
            completion_id, index, owner, adapter, num_prompt_tokens, arrived_at.get(now), submitted_at=now
        )
        self._running[id(trace)] = trace
        try:
            yield trace
        except Exception:
            trace.end = "failed"
            raise
        except BaseException:  # the client left, or another choice of the request failed
            trace.end = "cancelled"
            raise
        finally:
            trace.ended_at = time.monotonic()
            del self._running[id(trace)]
            self._ended.append(trace)

    def took(self, trace: RequestTrace, num_tokens: int, *, queue_s: float, num_cached_tokens: int) -> None:
        """A step added tokens to the choice; the last two are read with the first token only."""
        if not num_tokens:
            return
        now = time.monotonic()
        if not trace.num_tokens:
            trace.queue_s, trace.num_cached_tokens = queue_s, num_cached_tokens
            trace.first_token_at = now
            self._first_token.add(now - trace.arrived_at)
        else:
            self._inter_token.add((now - trace.last_token_at) / num_tokens)
        trace.num_tokens += num_tokens
        trace.last_token_at = now

    def latencies(self) -> dict[str, float | None]:
        """Seconds to the first token and between tokens, over the last 15 s; None without any."""
        first_p50, first_p99 = self._first_token.percentiles(0.5, 0.99)
        inter_p50, inter_p99 = self._inter_token.percentiles(0.5, 0.99)
        return {
            "first_token_p50": first_p50,
            "first_token_p99": first_p99,
            "inter_token_p50": inter_p50,
            "inter_token_p99": inter_p99,
        }

    def view(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """What runs, oldest first, and what ended, newest first, each with its owner."""
        now = time.monotonic()
        return {
            "running": [(trace.owner, trace.view(now)) for trace in self._running.values()],
            "ended": [(trace.owner, trace.view(now)) for trace in reversed(self._ended)],
        }
