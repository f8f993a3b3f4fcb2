"""Starts the services together, reports them, restarts what crashes, stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Sequence
from pathlib import Path

from kiln_cli.up.console import UpConsole, last_words
from kiln_cli.up.process import SupervisedProcess
from kiln_cli.up.specs import ServiceSpec, SharedFate
from kiln_common.settings import EXIT_CONFIG, EXIT_DEVICE

# A service that dies this often before it was ever ready will not become ready by trying again.
_MAX_FAILED_STARTS = 3
# For services whose device has failed: they have nothing left to finish.
_FAULT_GRACE_S = 5.0


class Supervisor:
    """Owns the processes of one `kiln up`.

    Below `state_dir`: logs/NAME.log with everything a service printed, pids/NAME.pid while it runs.
    `inherited_fds`: held open by every service; see StateDirLock. After a fault of the device, the
    services of `shared_fate` are all started again, since none of them can go on.
    """

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        state_dir: Path,
        console: UpConsole,
        *,
        inherited_fds: Sequence[int] = (),
        shared_fate: SharedFate | None = None,
    ) -> None:
        self._shared_fate = shared_fate
        self._renewal: asyncio.Task[None] | None = None
        log_dir, pid_dir = state_dir / "logs", state_dir / "pids"
        for folder in (log_dir, pid_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self._console = console
        self._failed: str | None = None
        self._is_misconfigured = False
        self._stop_requested = asyncio.Event()
        self.processes = {
            spec.name: SupervisedProcess(
                spec,
                log_dir / f"{spec.name}.log",
                pid_dir / f"{spec.name}.pid",
                on_line=console.service_line,
                on_ready=console.service_ready,
                on_exit=self._service_exited,
                inherited_fds=inherited_fds,
            )
            for spec in specs
        }

    def request_stop(self) -> None:
        self._stop_requested.set()

    async def wait_until_ready(self) -> None:
        """Return once every service has answered its probe."""
        await asyncio.gather(*(process.is_ready.wait() for process in self.processes.values()))

    async def run_until_signal(self) -> int:
        """Run until SIGINT or SIGTERM asks to stop; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.request_stop)
        return await self.run()

    async def run(self) -> int:
        """Run until asked to stop. Returns the exit code: 0, 1 or EXIT_CONFIG.

        1 when a service could not start, EXIT_CONFIG when that was because of its settings or the model.

        Raises:
            OSError: a process could not be started at all; the others were stopped.
        """
        tasks = [asyncio.create_task(process.run()) for process in self.processes.values()]
        all_ready = asyncio.create_task(self._announce_when_ready())
        stop_requested = asyncio.create_task(self._stop_requested.wait())
        try:
            # A service's task ends before the stop only when it failed for good.
            await asyncio.wait([stop_requested, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            all_ready.cancel()
            stop_requested.cancel()
            if self._renewal is not None:
                await self._renewal  # it takes seconds, and must not meet the stop half way
            await self._stop_all()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        if self._failed is not None:
            last_lines = self.processes[self._failed].last_lines
            if self._is_misconfigured:
                self._console.settings_refused(self._failed, last_words(last_lines) or last_lines)
                return EXIT_CONFIG
            self._console.start_failed(self._failed, last_lines)
            return 1
        self._console.stopped()
        return 0

    async def _announce_when_ready(self) -> None:
        await self.wait_until_ready()
        self._console.all_ready()

    def _service_exited(self, name: str, code: int, delay_s: float) -> None:
        process = self.processes[name]
        is_misconfigured = code == EXIT_CONFIG
        if not process.was_ready and (is_misconfigured or process.num_crashes >= _MAX_FAILED_STARTS):
            process.give_up()
            if self._failed is None:
                self._failed, self._is_misconfigured = name, is_misconfigured
            self.request_stop()
            return
        self._console.service_exited(name, code, delay_s)
        fate = self._shared_fate
        # By that code alone: an abort (-SIGABRT) may be one process's own bug and costs it alone.
        is_fault = code == EXIT_DEVICE
        if fate is not None and name in fate.names and is_fault and self._renewal is None:
            self._renewal = asyncio.create_task(self._renew(fate))

    async def _renew(self, fate: SharedFate) -> None:
        """A device that failed one of them has failed all, also those that have not noticed yet."""
        names = [name for name in self.processes if name in fate.names]
        self._console.device_fault(names)
        members = [self.processes[name] for name in names]
        await asyncio.gather(*(member.hold(_FAULT_GRACE_S) for member in members))
        try:
            await asyncio.to_thread(fate.renew)
        except Exception as error:  # noqa: BLE001 they run without it, which they find out themselves
            self._console.note(f"MPS did not come back, engine and trainer take turns: {error}")
        for member in members:
            member.release()
        self._renewal = None

    async def _stop_all(self) -> None:
        """Gateways first, so that no new work arrives; Redis last. Several of a kind end together."""
        self._console.stopping()
        latest_first = reversed(self.processes.items())
        for _, kind in itertools.groupby(latest_first, key=lambda item: item[0].partition("-")[0]):
            with contextlib.suppress(ProcessLookupError):
                await asyncio.gather(*(process.stop() for _, process in kind))
