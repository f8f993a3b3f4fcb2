"""`python -m tests.support.chain_trainer STEP_S`: the trainer process with a backend without torch.

Everything but the arithmetic is what `python -m kiln_trainer` runs. A step takes STEP_S seconds.
"""

from __future__ import annotations

import asyncio
import sys
import time

from kiln_common.logs import configure_logs
from kiln_common.stop_signals import wait_for_stop_signal
from kiln_trainer.bootstrap import start_trainer
from kiln_trainer.settings import TrainerSettings
from tests.support.jobs import ChainBackend


async def main(step_s: float) -> None:
    backend = ChainBackend(num_steps=8, before_step=lambda step: time.sleep(step_s))
    trainer = await start_trainer(TrainerSettings(), lambda settings: backend)  # type: ignore[call-arg]
    await wait_for_stop_signal()
    await trainer.stop()


if __name__ == "__main__":
    configure_logs("trainer")
    asyncio.run(main(float(sys.argv[1])))
