"""Checkpoints of one job: a safetensors file per saved step, whole or not there.

A file holds the adapter's parameters, the optimiser's moments and the old policy's log-probabilities;
its metadata holds the step, the token count, a hash of the job and one of the tensors. No random
state is kept because none is carried: each epoch's order is drawn from the job's seed and the epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

log = structlog.get_logger()
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_NUM_KEPT = 2  # the newest, and one before it in case the newest is damaged
_HEADER = "kiln"


@dataclass(frozen=True)
class Checkpoint:
    """A job's state after `step` updates.

    `metrics` are the latest reported ones. Tensor names start with their group: `lora/`, `moment/`
    and `stream/`.
    """

    step: int
    num_tokens: int
    job_hash: str
    metrics: Mapping[str, float]
    tensors: Mapping[str, torch.Tensor]

    def group(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one group, without its prefix."""
        prefix = name + "/"
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


class CheckpointFolder:
    """One job's checkpoints, oldest deleted as new ones come. The folder has one writer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()

    def write(self, checkpoint: Checkpoint) -> bool:
        """Put a checkpoint on disk, so that a crash at any moment leaves it whole or absent.

        Returns False where the disk does not take it: the job goes on, and a crash costs more of it.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        header = {
            "step": checkpoint.step,
            "num_tokens": checkpoint.num_tokens,
            "job_hash": checkpoint.job_hash,
            "metrics": dict(checkpoint.metrics),
            "tensors_sha256": _digest(tensors),
        }
        path = self._folder / f"step-{checkpoint.step:08d}.safetensors"
        content = save(tensors, metadata={_HEADER: json.dumps(header, sort_keys=True)})
        try:
            write_durably(path, content)
        except OSError as error:
            log.warning("checkpoint_not_written", step=checkpoint.step, bytes=len(content), reason=str(error))
            return False
        for _, old in self._files()[_NUM_KEPT:]:
            old.unlink()
        return True

    def newest(self, job_hash: str) -> Checkpoint | None:
        """The latest whole checkpoint of this very job; damaged and foreign files are passed over."""
        for step, path in self._files():
            try:
                checkpoint = _read(path)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                log.warning("checkpoint_unreadable", file=path.name, error=str(error))
                continue
            if checkpoint.job_hash == job_hash and checkpoint.step == step:
                return checkpoint
            log.warning("checkpoint_of_another_job", file=path.name)
        return None

    def _files(self) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint file, newest first."""
        found = [(_NAME.fullmatch(path.name), path) for path in self._folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, force it to disk, then rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # it may be what fills the disk
        raise
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[_HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
    if _digest(tensors) != header["tensors_sha256"]:
        raise ValueError("its bytes are not those that were written")
    return Checkpoint(
        step=header["step"],
        num_tokens=header["num_tokens"],
        job_hash=header["job_hash"],
        metrics=header["metrics"],
        tensors=tensors,
    )


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
