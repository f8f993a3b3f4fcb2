"""NVIDIA's Multi-Process Service for the engine and the trainer of one `kiln up`.

Its server merges both processes' work on the GPU, so that their kernels run at once. It has folders
of its own here, and so is nobody else's; it is found to work before anything relies on it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PIPE_VARIABLE, LOG_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_PROBE_TIMEOUT_S = 30.0
_END_TIMEOUT_S, _RETRY_S = 10.0, 0.2


class MpsUnavailable(Exception):
    """Why no MPS server serves here, as one line for the user."""


class MpsServer:
    """One control daemon, and the server it starts for its first client. Not for use by threads at once.

    `pipe_dir` holds the sockets, so its path must be short; `log_dir` the daemon's own logs.
    """

    def __init__(self, pipe_dir: Path, log_dir: Path, *, command_timeout_s: float = 10.0) -> None:
        self._pipe_dir = pipe_dir
        self._log_dir = log_dir
        self._command_timeout_s = command_timeout_s

    @property
    def env(self) -> Mapping[str, str]:
        """What a process needs to be its client."""
        return {PIPE_VARIABLE: str(self._pipe_dir), LOG_VARIABLE: str(self._log_dir)}

    def start(self) -> None:
        """Start the daemon afresh and let a first client find the GPU through it.

        Raises:
            MpsUnavailable: it is not installed, or does not serve; nothing of it is left running.
        """
        if shutil.which(CONTROL) is None:
            raise MpsUnavailable(f"{CONTROL} is not installed")
        for folder in (self._pipe_dir, self._log_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # One that outlived a killed supervisor, or a fault, may take a moment to end.
        patience_s = _END_TIMEOUT_S if self.stop() else 0.0
        try:
            self._start_daemon(patience_s)  # which may be there although it did not answer
            self._probe()
        except BaseException:  # an interrupt too: nobody else would end it
            self.stop()
            raise

    def stop(self) -> bool:
        """Ask daemon and server to end; clients must have ended before. False if there was none to ask."""
        if not self._log_dir.is_dir():
            return False
        try:
            self._run([CONTROL], "quit\n")
        except MpsUnavailable:
            return False
        return True

    def _start_daemon(self, patience_s: float) -> None:
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                return self._run([CONTROL, "-d"])
            except MpsUnavailable:
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(_RETRY_S)

    def _probe(self) -> None:
        """Whether a process of its own gets to the GPU, and through MPS."""
        self._run([sys.executable, "-m", "kiln_cli.up.mps_probe"], timeout_s=_PROBE_TIMEOUT_S)

    def _run(self, command: list[str], words: str = "", timeout_s: float | None = None) -> None:
        name = command[0] if command[0] == CONTROL else "its first client"
        # Into a file: a daemon may keep its output open for ever, and a pipe would be waited for.
        with (self._log_dir / "commands.log").open("w+") as output:
            try:
                done = subprocess.run(
                    command,
                    env={**os.environ, **self.env},
                    input=words,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=timeout_s or self._command_timeout_s,
                    start_new_session=True,  # Ctrl-C must not reach the daemon before its clients
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise MpsUnavailable(f"{name} did not answer: {error}") from error
            output.seek(0)
            said = output.read().strip().splitlines()
        if done.returncode:
            what = said[-1] if said else "without a word"
            raise MpsUnavailable(f"{name} ended with code {done.returncode}: {what}")


def has_nvidia_gpu() -> bool:
    """Whether the driver's device files are there: the cheapest sign of a GPU, without torch."""
    return Path("/dev/nvidiactl").exists()
