"""One GPU for each engine of a `kiln up`, and how many trainers share them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kiln_cli.errors import NotEnoughGpus, TooManyTrainers


def assign_gpus(num_engines: int, device: str | None, devices: Path = Path("/dev")) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES is to be for each engine; empty leaves the choice to the engine.

    Raises:
        NotEnoughGpus: there are GPUs, and fewer of them than engines.
    """
    nobodys_choice = ("",) * num_engines
    if num_engines == 1 or (device or os.environ.get("KILN_ENGINE_DEVICE")) == "cpu":
        return nobodys_choice
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        gpus = [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    else:
        gpus = [str(index) for index in range(len(list(devices.glob("nvidia[0-9]*"))))]
    if not gpus and device != "cuda":
        return nobodys_choice
    if len(gpus) < num_engines:
        raise NotEnoughGpus(f"{num_engines} engines need a GPU each, and there are {len(gpus)}")
    return tuple(gpus[:num_engines])


def choose_num_trainers(wanted: int | None, engine_gpus: Sequence[str]) -> int:
    """As many as were asked for, else one for each GPU with an engine; one without a GPU each.

    Raises:
        TooManyTrainers: they would have to share an engine, or a GPU of their own.
    """
    has_own_gpu = bool(os.environ.get("KILN_TRAINER_DEVICE"))
    most = 1 if has_own_gpu else len(engine_gpus)
    if wanted is None:
        return most if all(engine_gpus) else 1
    if wanted > most:
        room = "a GPU of the trainer's own" if has_own_gpu else f"{most} engines"
        raise TooManyTrainers(f"{wanted} trainers cannot share {room}")
    return wanted
