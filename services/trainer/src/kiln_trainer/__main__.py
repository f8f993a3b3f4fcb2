"""`python -m kiln_trainer`: the trainer process."""

from __future__ import annotations

import asyncio
import os
import sys

import structlog
import torch

from kiln_common.logs import configure_logs
from kiln_common.rpc.server import wait_for_stop_signal
from kiln_common.settings import EXIT_DEVICE, ConfigurationError, exit_for_configuration, read_settings
from kiln_trainer.bootstrap import RunningTrainer, start_trainer
from kiln_trainer.settings import TrainerSettings

log = structlog.get_logger()

_CHECK_S = 1.0


async def serve(settings: TrainerSettings) -> bool:
    """Serve until SIGTERM or SIGINT (True), or until the worker thread has died (False)."""
    trainer = await start_trainer(settings)
    stop_signal = asyncio.create_task(wait_for_stop_signal())
    death = asyncio.create_task(_worker_death(trainer))
    try:
        await asyncio.wait({stop_signal, death}, return_when=asyncio.FIRST_COMPLETED)
        return not death.done()
    finally:
        stop_signal.cancel()
        death.cancel()
        await trainer.stop()


async def _worker_death(trainer: RunningTrainer) -> None:
    while trainer.worker.is_alive:
        await asyncio.sleep(_CHECK_S)
    log.error("worker_died")


def main() -> None:
    settings = read_settings(TrainerSettings)
    configure_logs("trainer", settings.log_level)
    if not torch.cuda.is_available():
        os.nice(settings.cpu_niceness)  # threads started from here on inherit it
    try:
        sys.exit(0 if asyncio.run(serve(settings)) else EXIT_DEVICE)
    except ConfigurationError as error:
        exit_for_configuration(error)


if __name__ == "__main__":
    main()
