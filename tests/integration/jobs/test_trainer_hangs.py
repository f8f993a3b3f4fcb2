"""A trainer that is there and does nothing (SIGSTOP): what only asks gives up early, and says who is away."""

import asyncio
import socket
import time

import pytest

from kiln_common.clients.trainer import TrainerClient
from kiln_common.errors import TrainerUnavailable
from kiln_common.pb import trainer_pb2


@pytest.fixture
def silent_address():
    """Connections are accepted, as the kernel does for a stopped process, and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def test_questions_have_a_deadline_of_their_own(silent_address):
    client = TrainerClient(silent_address, timeout_s=60, read_timeout_s=0.3)
    started_s = time.monotonic()
    questions = (client.status(), client.get("job_1"), client.list(), client.queue())
    for answer in await asyncio.gather(*questions, return_exceptions=True):
        assert isinstance(answer, TrainerUnavailable)
        assert "deadline_exceeded" in str(answer)
    assert time.monotonic() - started_s < 30
    await client.close()


async def test_what_changes_a_job_is_waited_for_longer(silent_address):
    client = TrainerClient(silent_address, timeout_s=0.6, read_timeout_s=0.1)
    started_s = time.monotonic()
    with pytest.raises(TrainerUnavailable):
        await client.submit(trainer_pb2.SubmitRequest())
    assert time.monotonic() - started_s >= 0.5
    await client.close()
