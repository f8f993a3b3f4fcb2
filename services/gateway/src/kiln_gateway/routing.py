"""Which engine a request goes to: where its beginning is cached, if that engine is not too busy.

A request whose beginning an engine has computed goes to the engine with the longest such beginning.
Any other goes to an engine that the beginning itself names, so that several gateways that know
nothing of each other send the same beginning to the same place: rendezvous hashing (Thaler and
Ravishankar 1998) with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016, arXiv 1608.01350): an
engine that has more than its share is passed over.

Pure: loads, times and what engines hold come in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from hashlib import blake2b

# An engine may run this many times the mean. Less finds less in the caches, more lets requests wait.
MAX_IMBALANCE = 1.25
# New conversations are spread more evenly, since each comes back to where it was.
_MAX_PLACEMENT_IMBALANCE = 1.1
# So few requests at once an engine takes at any time: a step of eight rows costs about what one of one
# does, and a beginning computed again costs more.
_ALWAYS_ALLOWED = 8
# Placements are forgotten at this rate.
_FORGET_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineView:
    """What is known of an engine that may be chosen."""

    engine_id: str
    num_running: int  # requests running or waiting there, of all gateways
    num_placed: float  # requests that this gateway has lately sent there
    prefixes: Container[bytes]  # beginnings it holds, by name
    has_adapters: bool = True  # all that the request names are on its device


class PlacementCount:
    """How many requests were lately sent to an engine; old ones fade."""

    def __init__(self) -> None:
        self._count = 0.0
        self._at_s = 0.0

    def add(self, now_s: float) -> None:
        self._count, self._at_s = self.value(now_s) + 1.0, now_s

    def value(self, now_s: float) -> float:
        return self._count * math.exp(-max(0.0, now_s - self._at_s) / _FORGET_S)


def choose(engines: Sequence[EngineView], path: Sequence[bytes], key: bytes) -> int:
    """Index of the engine to send a request to.

    `path` names the beginnings of its prompt, shortest first; `key` stands for the one by which new
    conversations are told apart. At least one engine is needed.

    No engine is chosen that runs more than MAX_IMBALANCE times the mean, this request included,
    while another does not; a few requests are always allowed.
    """
    matches = [_match_length(engine.prefixes, path) for engine in engines]
    ranks = [_rank(key, engine.engine_id) for engine in engines]
    most_running = max(_share([engine.num_running for engine in engines], MAX_IMBALANCE), _ALWAYS_ALLOWED)
    has_room = [index for index, engine in enumerate(engines) if engine.num_running < most_running]
    known = [index for index in has_room if matches[index]]
    if known:
        return min(
            known, key=lambda i: (-matches[i], engines[i].num_running, engines[i].num_placed, ranks[i])
        )
    most_placed = _share([engines[index].num_placed for index in has_room], _MAX_PLACEMENT_IMBALANCE)
    even = [index for index in has_room if engines[index].num_placed + 1 <= most_placed]
    if even:
        return min(even, key=lambda i: (not engines[i].has_adapters, ranks[i]))
    return min(has_room, key=lambda i: (engines[i].num_placed, ranks[i]))


def _share(counts: Sequence[float], imbalance: float) -> int:
    """Most that one may have when one more has come: `imbalance` times the mean, rounded up."""
    return math.ceil(imbalance * (sum(counts) + 1) / len(counts))


def _match_length(prefixes: Container[bytes], path: Sequence[bytes]) -> int:
    """Pages of the longest beginning that an engine holds."""
    return next((length for length in range(len(path), 0, -1) if path[length - 1] in prefixes), 0)


def _rank(key: bytes, engine_id: str) -> bytes:
    return blake2b(key + engine_id.encode(), digest_size=8).digest()
