"""Background tasks end, also one that drops a cancellation."""

import asyncio

from kiln_common.ending import end_tasks


async def test_a_task_that_drops_its_first_cancellation_ends_too():
    num_dropped = 0

    async def stubborn():
        nonlocal num_dropped
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if num_dropped:
                    raise
                num_dropped += 1

    async def broken():
        raise RuntimeError("it was broken before")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(broken())]
    await asyncio.sleep(0)
    await end_tasks(*tasks)
    assert num_dropped == 1
    assert all(task.done() for task in tasks)
