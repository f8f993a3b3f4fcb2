"""The trainer process as the measuring process sees it: told what to do, asked what it has done."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MOST_START_S = 240.0  # the first job on a kind of GPU compiles its kernels
_MOST_STOP_S = 60.0


class TrainerFailed(Exception):
    """The trainer process ended, or did not get anywhere; its error output says why."""


class TrainerProcess:
    """A context manager that leaves no process behind. Times are those of time.monotonic.

    `device` is a GPU of the trainer's own, or empty for the engine's.
    """

    def __init__(
        self, address: str, num_documents: int, document_tokens: int, vocab_size: int, device: str
    ) -> None:
        sizes = [str(number) for number in (num_documents, document_tokens, vocab_size)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sharing.training", address, *sizes, device],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._steps: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._num_ended = 0
        self._is_gone = False
        self.mode = ""
        threading.Thread(target=self._read, daemon=True).start()

    def train(self, shares: dict[str, float], yield_s: float) -> None:
        """Begin a job and return once it is in its stride: two steps are done."""
        with self._changed:
            self._steps = []
        self._say({"shares": shares, "yield_s": yield_s})
        self._await(lambda: len(self._steps) >= 2, _MOST_START_S, "two steps")

    def rest(self) -> None:
        """End the job; returns when nothing of it runs any more."""
        num_before = self._num_ended
        self._say(None)
        self._await(lambda: self._num_ended > num_before, _MOST_STOP_S, "the end of a job")

    def steps_between(self, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """Steps that ended in a stretch of time: `tokens`, `ended_s` and `metrics` of each."""
        with self._changed:
            return [step for step in self._steps if start_s <= step["ended_s"] <= end_s]

    def _say(self, words: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise TrainerFailed(f"the trainer process ended with {self._process.wait()}") from error

    def _await(self, condition: Any, timeout_s: float, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_gone or condition(), timeout_s)
            if not condition():
                state = f"ended with {self._process.wait()}" if self._is_gone else "runs on"
                raise TrainerFailed(f"no {what} within {timeout_s:.0f} s; the trainer process {state}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                print(f"trainer: {line}", end="", flush=True)
                continue
            with self._changed:
                if "ended" in message:
                    self._num_ended += 1
                    self.mode = message["mode"]
                else:
                    self._steps.append(message)
                self._changed.notify_all()
        with self._changed:
            self._is_gone = True
            self._changed.notify_all()

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
