"""Writes a checkpoint folder piece by piece: tensors into shards, then their index."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kiln_nn.weights.checkpoint_files import INDEX_FILE

_SHARD_BYTES = 4 << 30


class FolderWriter:
    """Holds at most a shard of tensors in memory; `finish` makes the folder whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self.num_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a copy of the tensor for the files."""
        if sum(one.nbytes for one in self._open.values()) + tensor.nbytes > _SHARD_BYTES:
            self._write_shard()
        # A copy of its own: files know no views.
        self._open[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, name the shards by their number, and write the index."""
        self._write_shard()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            file_name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(number).rename(self._folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        index_path = self._folder / INDEX_FILE
        index_path.write_text(json.dumps(index, indent=1))
        for file_name in set(weight_map.values()):
            # safetensors lets only its writer read a file.
            (self._folder / file_name).chmod(index_path.stat().st_mode)

    def _write_shard(self) -> None:
        if self._open:
            self._shards.append(list(self._open))
            save_file(self._open, self._part(len(self._shards)), metadata={"format": "pt"})
            self._open = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.unfinished"
