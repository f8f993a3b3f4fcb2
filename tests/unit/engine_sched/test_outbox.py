import asyncio
import threading

import pytest

from kiln_engine.domain import SequenceEvent
from kiln_engine.domain.errors import SessionOverflow
from kiln_engine.servicer.outbox import Outbox


def step(number: int) -> list[SequenceEvent]:
    return [SequenceEvent(f"r{number}")]


async def test_steps_come_out_in_order_from_another_thread():
    outbox = Outbox(capacity=100)
    thread = threading.Thread(target=lambda: [outbox.offer(step(n)) for n in range(50)])
    thread.start()
    taken = [await asyncio.wait_for(outbox.take(), 60) for _ in range(50)]
    thread.join()
    assert taken == [step(n) for n in range(50)]


async def test_a_full_outbox_takes_nothing_more_and_its_reader_learns_it():
    outbox = Outbox(capacity=2)
    assert [outbox.offer(step(n)) for n in range(4)] == [True, True, False, False]
    with pytest.raises(SessionOverflow, match="2 steps"):
        await outbox.take()


async def test_a_reader_that_keeps_up_never_overflows():
    outbox = Outbox(capacity=1)
    for number in range(10):
        assert outbox.offer(step(number))
        assert await outbox.take() == step(number)


async def test_closing_ends_the_reader_and_refuses_more():
    outbox = Outbox(capacity=2)
    reader = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.close()
    assert await asyncio.wait_for(reader, 60) is None
    assert not outbox.offer(step(1))
