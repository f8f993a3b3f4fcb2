"""The arena: all base weights of one model in one allocation, described by one manifest."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any, Literal

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.kernels.quantised import QuantisedMatrix, tensors_of
from kiln_nn.weights.cuda_memory import CudaMemory
from kiln_nn.weights.device_region import device_id
from kiln_nn.weights.host_memory import HostMemory
from kiln_nn.weights.manifest import Manifest, TensorEntry, arena_views, fused_views
from kiln_nn.weights.vmm_memory import VmmMemory

ArenaMemory = HostMemory | VmmMemory | CudaMemory
GpuTransport = Literal["vmm", "legacy"]

_CHECKSUM_CHUNK_BYTES = 64 << 20


class ArenaReader:
    """Views, checksum and ownership test over an arena's bytes; the same for owner and borrower."""

    def __init__(self, manifest: Manifest, bytes_u8: torch.Tensor) -> None:
        self.manifest = manifest
        self._bytes_u8: torch.Tensor | None = bytes_u8

    def views(self) -> dict[str, Any]:
        """Every tensor or QuantisedMatrix under its checkpoint name, not copied; nobody may write to them."""
        return arena_views(self.manifest.entries, self.bytes_u8())

    def fused_views(self) -> dict[str, Any]:
        """Matrices that read the same input as one, e.g. `model.layers.0.mlp.gate_up_proj.weight`."""
        return fused_views(self.manifest.entries, self.bytes_u8())

    def borrows(self, weight: torch.Tensor | QuantisedMatrix) -> bool:
        """Whether all of a weight's storage lies inside the arena."""
        start = self.bytes_u8().data_ptr()
        end = start + self.manifest.nbytes
        return all(
            start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
            for tensor in tensors_of(weight)
        )

    def num_foreign_bytes(self, tensors: Mapping[str, torch.Tensor | QuantisedMatrix]) -> int:
        """Bytes of those tensors that lie outside the arena: 0 proves that none was copied."""
        return sum(tensor.nbytes for tensor in tensors.values() if not self.borrows(tensor))

    def checksum(self) -> str:
        """sha256 (hex) over all bytes of the arena."""
        return sha256_of(self.bytes_u8())

    def bytes_u8(self) -> torch.Tensor:
        """Flat uint8 [nbytes] over the whole arena."""
        assert self._bytes_u8 is not None, "the arena was closed"
        return self._bytes_u8


class WeightArena(ArenaReader):
    """An arena this process allocated and filled. Its bytes never change after loading."""

    def __init__(self, manifest: Manifest, memory: ArenaMemory) -> None:
        super().__init__(manifest, memory.readonly_u8())
        self.memory = memory

    def close(self) -> None:
        """Let go of the memory; it is freed when no view and no other process holds it."""
        self._bytes_u8 = None
        self.memory.close()


def allocate(nbytes: int, device: torch.device, transport: GpuTransport = "vmm") -> ArenaMemory:
    """Memory for an arena on the CPU or a GPU; on a GPU `transport` says how others will map it."""
    if device.type == "cpu":
        return HostMemory(nbytes)
    return VmmMemory(nbytes, device) if transport == "vmm" else CudaMemory(nbytes, device)


def finish(
    memory: ArenaMemory,
    entries: list[TensorEntry],
    model_hash: str,
    config: ModelConfig,
    device: torch.device,
    boot_id: str | None = None,
) -> WeightArena:
    """Seal filled memory and describe it. No writable view of it may be alive."""
    memory.seal()
    manifest = Manifest(
        model_hash=model_hash,
        config=config,
        device_id="cpu" if device.type == "cpu" else device_id(device),
        boot_id=boot_id or uuid.uuid4().hex,
        transport=memory.transport,
        nbytes=memory.nbytes,
        entries=tuple(entries),
    )
    return WeightArena(manifest, memory)


def sha256_of(bytes_u8: torch.Tensor) -> str:
    """sha256 (hex) of a flat uint8 tensor, from the device in chunks."""
    digest = hashlib.sha256()
    for chunk in bytes_u8.split(_CHECKSUM_CHUNK_BYTES):
        digest.update(chunk.cpu().numpy())
    return digest.hexdigest()
