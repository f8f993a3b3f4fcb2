"""`python -m kiln_engine`: the engine process."""

from __future__ import annotations

import asyncio
import sys

import structlog

from kiln_common.ending import end_tasks
from kiln_common.errors import KilnError
from kiln_common.logs import configure_logs
from kiln_common.rpc.tls import configure_tls
from kiln_common.settings import EXIT_DEVICE, ConfigurationError, exit_for_configuration, read_settings
from kiln_common.stop_signals import end_on_stop_signals, wait_for_stop_signal
from kiln_common.tracing import configure_tracing
from kiln_common.variables import warn_of_unknown_variables
from kiln_engine.bootstrap import RunningEngine, start_engine
from kiln_engine.device_side import load_device_side
from kiln_engine.heap import freeze_heap
from kiln_engine.settings import EngineSettings

log = structlog.get_logger()


async def serve(settings: EngineSettings) -> int:
    """Serve until SIGTERM or SIGINT, or until the device fails; returns the exit code.

    A second signal is impatience: what still runs is handed back at once.
    """
    engine = await start_engine(settings, load_device_side(settings))
    freeze_heap()
    stopped = asyncio.create_task(wait_for_stop_signal())
    failed = asyncio.create_task(engine.has_failed.wait())
    try:
        await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_tasks(stopped, failed)
        hurried = asyncio.create_task(_hand_back_on_signal(engine))
        await engine.stop()
        await end_tasks(hurried)
    return EXIT_DEVICE if engine.has_failed.is_set() else 0


async def _hand_back_on_signal(engine: RunningEngine) -> None:
    await wait_for_stop_signal()
    await engine.intake.drain(0.0)


def main() -> None:
    end_on_stop_signals()
    settings = read_settings(EngineSettings)
    configure_logs("engine", settings.log_level)
    warn_of_unknown_variables()
    configure_tracing("engine")
    try:
        configure_tls()
        code = asyncio.run(serve(settings))
    except ConfigurationError as error:
        exit_for_configuration(error)
    except KilnError as error:
        log.error("engine_not_started", code=error.code, reason=str(error), hint=error.hint)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
