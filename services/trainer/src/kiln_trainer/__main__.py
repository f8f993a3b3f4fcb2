"""`python -m kiln_trainer`: the trainer process."""

from __future__ import annotations

import asyncio
import os
import sys

import structlog
import torch

from kiln_common.errors import KilnError
from kiln_common.logs import configure_logs
from kiln_common.rpc.tls import configure_tls
from kiln_common.settings import EXIT_DEVICE, ConfigurationError, exit_for_configuration, read_settings
from kiln_common.stop_signals import end_on_stop_signals, wait_for_stop_signal
from kiln_common.tracing import configure_tracing
from kiln_common.variables import warn_of_unknown_variables
from kiln_trainer.bootstrap import RunningTrainer, start_trainer
from kiln_trainer.domain.errors import DeviceBroken
from kiln_trainer.settings import TrainerSettings

log = structlog.get_logger()

_CHECK_S = 1.0


async def serve(settings: TrainerSettings) -> int:
    """Serve until SIGTERM or SIGINT, or until the worker thread has died; returns the exit code."""
    trainer = await start_trainer(settings)
    stop_signal = asyncio.create_task(wait_for_stop_signal())
    death = asyncio.create_task(_worker_death(trainer))
    try:
        await asyncio.wait({stop_signal, death}, return_when=asyncio.FIRST_COMPLETED)
        return exit_code_of(trainer.worker.failure) if death.done() else 0
    finally:
        stop_signal.cancel()
        death.cancel()
        await trainer.stop()


def exit_code_of(failure: BaseException | None) -> int:
    """EXIT_DEVICE ends the engine too where both share the device, so only the device's own failure is one."""
    return EXIT_DEVICE if isinstance(failure, DeviceBroken | torch.AcceleratorError) else 1


async def _worker_death(trainer: RunningTrainer) -> None:
    while trainer.worker.is_alive:
        await asyncio.sleep(_CHECK_S)
    failure = trainer.worker.failure
    log.error("worker_died", reason=f"{type(failure).__name__}: {failure}")


def main() -> None:
    end_on_stop_signals()
    settings = read_settings(TrainerSettings)
    configure_logs("trainer", settings.log_level)
    warn_of_unknown_variables()
    configure_tracing("trainer")
    if not torch.cuda.is_available():
        os.nice(settings.cpu_niceness)  # threads started from here on inherit it
    try:
        configure_tls()
        code = asyncio.run(serve(settings))
    except ConfigurationError as error:
        exit_for_configuration(error)
    except KilnError as error:
        log.error("trainer_not_started", code=error.code, reason=str(error), hint=error.hint)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
