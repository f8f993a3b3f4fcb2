"""One supervised process: start it, keep its log, restart it with backoff, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from kiln_cli.up.specs import ServiceSpec
from kiln_common.variables import without_unknown_variables

_PR_SET_PDEATHSIG = 1
_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# A run this long forgives earlier crashes.
_STABLE_AFTER_S = 30.0
_PROBE_EVERY_S = 0.1

# The library is opened here: after fork nothing may allocate or lock.
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Ask Linux to end this child when the supervisor dies, however that happens."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class SupervisedProcess:
    """Keeps one service running until `stop()`.

    `on_line(name, line)` gets each line the service prints, `on_ready(name, seconds, detail)` each
    time its probe first succeeds after a start, `on_exit(name, code, delay)` each unexpected end
    with the seconds until the restart. The service holds `inherited_fds` open for as long as it lives.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        log_path: Path,
        pid_path: Path,
        on_line: Callable[[str, str], None],
        on_ready: Callable[[str, float, str], None],
        on_exit: Callable[[str, int, float], None],
        *,
        inherited_fds: Sequence[int] = (),
    ) -> None:
        self.spec = spec
        self.was_ready = False
        self.num_crashes = 0
        self.last_lines: deque[str] = deque(maxlen=20)
        self._log_path, self._pid_path = log_path, pid_path
        self._on_line, self._on_ready, self._on_exit = on_line, on_ready, on_exit
        self._inherited_fds = tuple(inherited_fds)
        # `kiln` itself has said which variables nobody reads; four services need not say it again.
        self._environment = without_unknown_variables(os.environ)
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopping = asyncio.Event()
        self._may_start = asyncio.Event()
        self._may_start.set()
        self.is_ready = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Start and restart the service; returns after `stop()` or `give_up()`."""
        loop = asyncio.get_running_loop()
        while True:
            await self._may_start.wait()
            if self._is_stopping.is_set():
                return
            started_at = loop.time()
            code, has_served = await self._run_once()
            if self._is_stopping.is_set():
                return
            if code == 0 and has_served:
                self.num_crashes = 0  # somebody asked it to end
            else:
                self.num_crashes = 1 if loop.time() - started_at > _STABLE_AFTER_S else self.num_crashes + 1
            delay_s = _BACKOFF_S[min(max(self.num_crashes, 1), len(_BACKOFF_S)) - 1]
            self._on_exit(self.spec.name, code, delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_stopping.wait(), delay_s)

    async def _run_once(self) -> tuple[int, bool]:
        """One life of the service: its exit code, and whether it was ever ready."""
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.argv,
            env={**self._environment, "PYTHONUNBUFFERED": "1", **self.spec.env},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Its own session: Ctrl-C reaches the supervisor alone, which stops services in order.
            start_new_session=True,
            preexec_fn=_die_with_parent,
            pass_fds=self._inherited_fds,
            limit=1 << 20,
        )
        # stop() or hold() came while the process was being started.
        if self._is_stopping.is_set() or not self._may_start.is_set():
            self._process.terminate()
        self._pid_path.write_text(f"{self._process.pid}\n")
        probe = asyncio.create_task(self._wait_until_ready())
        try:
            await self._pump_output(self._process)
            return await self._process.wait(), self.is_ready.is_set()
        finally:
            probe.cancel()
            self.is_ready.clear()
            self._pid_path.unlink(missing_ok=True)

    async def _wait_until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        while True:
            detail = await self.spec.probe()
            if detail is not None:
                self.was_ready = True
                self.is_ready.set()
                self._on_ready(self.spec.name, loop.time() - started_at, detail)
                return
            await asyncio.sleep(_PROBE_EVERY_S)

    async def _pump_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with self._log_path.open("ab", buffering=0) as log_file:
            while True:
                try:
                    raw = await process.stdout.readline()
                except ValueError:  # a line longer than the limit; its rest follows as another
                    continue
                if not raw:
                    return
                with contextlib.suppress(OSError):  # a full disk must not stop the service as well
                    log_file.write(raw)
                line = raw.decode(errors="replace").rstrip("\n")
                self.last_lines.append(line)
                self._on_line(self.spec.name, line)

    def give_up(self) -> None:
        """From `on_exit`: the service has ended, and is not started again."""
        self._is_stopping.set()

    async def hold(self, grace_s: float) -> None:
        """End the service, and do not start it again before `release`."""
        self._may_start.clear()
        await self._end(grace_s)

    def release(self) -> None:
        self._may_start.set()

    async def stop(self) -> None:
        """End the service: SIGTERM, and SIGKILL when it has not gone within its stop time."""
        self._is_stopping.set()
        self._may_start.set()
        await self._end(self.spec.stop_timeout_s)

    async def _end(self, grace_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
