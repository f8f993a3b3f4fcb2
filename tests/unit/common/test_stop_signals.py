"""What SIGTERM and SIGINT do to a service that is still loading, in a real process."""

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
    rest, _ = process.communicate(timeout=20)
    assert (process.returncode, rest) == (128 + number, "")
