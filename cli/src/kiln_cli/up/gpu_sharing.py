"""How engine and trainer of one `kiln up` share a GPU: decided once, before either starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from kiln_cli.errors import UnknownGpuSharing
from kiln_cli.up.mps import PIPE_VARIABLE, MpsServer, MpsUnavailable, has_nvidia_gpu

Choice = Literal["auto", "mps", "time_slices"]
SETTING = "KILN_TRAINER_GPU_SHARING"


@dataclass(frozen=True)
class GpuSharing:
    """What follows for the services.

    `env` goes to engine and trainer. `note` is one line for the user, or empty. `renew` brings MPS
    back after a fault, once both have ended; None where there is no MPS server of this `kiln up`.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    renew: Callable[[], None] | None = None


def parse_choice(option: str | None) -> Choice:
    """The command line's choice, else the trainer's setting from the environment, else auto.

    Raises:
        UnknownGpuSharing: it is none of the three.
    """
    choice = option or os.environ.get(SETTING) or "auto"
    if choice not in get_args(Choice):
        raise UnknownGpuSharing(f"{choice!r} is not a way of sharing a GPU")
    return cast(Choice, choice)


@contextmanager
def shared_gpu(choice: Choice, device: str | None, run_dir: Path, state_dir: Path) -> Iterator[GpuSharing]:
    """Start MPS where it is wanted and works; it ends with the context. Never fails for want of MPS."""
    if (device or os.environ.get("KILN_ENGINE_DEVICE")) == "cpu" or not has_nvidia_gpu():
        yield GpuSharing(note=f"{choice} needs a GPU" if choice == "mps" else "")
    elif choice == "time_slices":
        yield _turns(run_dir)
    elif PIPE_VARIABLE in os.environ:  # an operator runs a server of their own
        yield GpuSharing({SETTING: choice}, note=f"using the MPS server in {os.environ[PIPE_VARIABLE]}")
    elif own_device := os.environ.get("KILN_TRAINER_DEVICE"):  # a GPU for each
        note = f"no MPS: the trainer has a GPU of its own (KILN_TRAINER_DEVICE={own_device})"
        yield GpuSharing(note=note if choice == "mps" else "")
    else:
        server = MpsServer(run_dir / "mps", state_dir / "logs" / "mps")
        try:
            server.start()
        except MpsUnavailable as error:
            yield _turns(run_dir, f"no MPS, engine and trainer take turns on the GPU: {error}")
            return
        try:
            yield GpuSharing(
                {**server.env, SETTING: "mps"}, "MPS runs: engine and trainer work at once", server.start
            )
        finally:
            server.stop()


def _turns(run_dir: Path, note: str = "") -> GpuSharing:
    """Engine and trainer as clients of no MPS server, not even of one that runs on this machine."""
    return GpuSharing({PIPE_VARIABLE: str(run_dir / "no-mps"), SETTING: "time_slices"}, note)
