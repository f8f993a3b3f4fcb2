"""What SIGTERM and SIGINT do to a service that loads, serves and ends, in a real process."""

import signal
import subprocess
import sys

import pytest

_LOADING = """
import threading
from kiln_common.stop_signals import end_on_stop_signals
end_on_stop_signals()
print("loading", flush=True)
try:
    threading.Event().wait(60)
except BaseException as error:
    print(f"met {error!r}")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_loads_ends_at_once_and_in_silence(number):
    process = subprocess.Popen(
        [sys.executable, "-c", _LOADING], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (128 + number, "")


_SERVING = """
import asyncio
from kiln_common.stop_signals import end_on_stop_signals, wait_for_stop_signal
async def serve():
    stopped = asyncio.create_task(wait_for_stop_signal())
    await asyncio.sleep(0)  # it listens
    print("serving", flush=True)
    await stopped
    print("finished", flush=True)
end_on_stop_signals()
asyncio.run(serve())
"""

_UNDER_UVICORN = """
import asyncio
import uvicorn
from kiln_common.stop_signals import end_on_stop_signals, ignore_stop_signals
async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    print("serving", flush=True)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("finished", flush=True)
    await send({"type": "lifespan.shutdown.complete"})
end_on_stop_signals()
ignore_stop_signals()
asyncio.run(uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None)).serve())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("service", [_SERVING, _UNDER_UVICORN])
def test_a_service_that_serves_ends_its_work_and_with_code_0(service, number):
    process = subprocess.Popen(
        [sys.executable, "-c", service], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "serving\n"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "finished\n")
