"""What other threads ask of the loop, in order of arrival."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from kiln_common.errors import KilnError
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.domain.result import SequenceEvent


class Sink(Protocol):
    """Where a client's events go."""

    def offer(self, events: list[SequenceEvent]) -> bool:
        """Take the events of one step, without waiting; False when the client does not keep up.

        Called from the loop thread.
        """
        ...


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    request: GenerationRequest
    adapter_slots: tuple[tuple[int, float], ...]
    sink: Sink


@dataclass(frozen=True, slots=True)
class AbortRequest:
    request_id: str
    # Why, where the request's own client did not ask for it.
    error: KilnError | None = None


@dataclass(frozen=True, slots=True)
class RunBetweenSteps:
    """Call something on the loop thread between two launches, and if `settles` while no step runs."""

    function: Callable[[], Any]
    settles: bool = True
    done: Future[Any] = field(default_factory=Future)


Command = SubmitRequest | AbortRequest | RunBetweenSteps


class Mailbox:
    """A queue that the loop empties between two steps, and sleeps on when it is idle."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def put(self, command: Command) -> bool:
        """Leave a command; False when the loop has ended and nobody will read it."""
        with self._changed:
            if self._is_closed:
                return False
            self._commands.append(command)
            self._changed.notify()
            return True

    def close(self) -> None:
        """Take no more commands, and wake the loop."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def take_all(self, *, wait: bool, timeout_s: float | None = None) -> list[Command]:
        """Every command left so far; with `wait`, sleeps until there is one or the mailbox closes."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._commands or self._is_closed, timeout_s)
            commands, self._commands = self._commands, []
            return commands
