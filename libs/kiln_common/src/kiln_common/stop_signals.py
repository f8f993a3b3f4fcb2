"""SIGTERM and SIGINT in the life of a service: while it starts, while it serves, while it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_on_stop_signals() -> None:
    """Until the service waits for them itself, end the process at once, with code 128 + the signal's number.

    A service that only loads has nothing to finish. Without this SIGINT would print a traceback, and a
    container's first process would ignore SIGTERM, as Linux has it there.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, _end)


def ignore_stop_signals() -> None:
    """From here on: for servers with handlers of their own, which raise the signal again once they end."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


async def wait_for_stop_signal() -> None:
    """Return when the process is asked to stop (SIGTERM or SIGINT)."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


def _end(number: int, frame: FrameType | None) -> None:
    # No exception: that could come out anywhere in what is being loaded.
    os._exit(128 + number)
