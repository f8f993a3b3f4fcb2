"""Ends background tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN_S = 0.2


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait for them; what they raise is not raised here.

    Before Python 3.12 `asyncio.wait_for` drops a cancellation that comes as its call returns, and
    redis-py sends every command through it. So a task that goes on is cancelled again.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)
