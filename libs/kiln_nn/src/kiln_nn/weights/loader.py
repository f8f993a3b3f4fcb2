"""Loads a checkpoint folder straight into an arena: checked strictly, streamed, hashed on the way.

Nothing is copied twice: a tensor goes from the mapped file to its place in the arena, cast there
if it must be. Hashing and copying run on a few threads, both without the interpreter lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from kiln_nn.config import ModelConfig
from kiln_nn.errors import CheckpointMismatch, CheckpointUnreadable, ShareUnsupported
from kiln_nn.weights.arena import GpuTransport, WeightArena, allocate, finish
from kiln_nn.weights.checkpoint_files import StoredTensor, check_against, scan_folder
from kiln_nn.weights.manifest import Manifest, arena_views, lay_out
from kiln_nn.weights.names import EMBEDDING, HEAD, TensorSpec, count_mtp_layers, expected_tensors

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
ProgressFn = Callable[[int, int], None]
_MAX_THREADS = 8


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory.

    `config.num_mtp_layers` is what the weights hold: 0 where config.json promises a layer that
    was not published. `num_vision_tensors` were recognised and left out.
    """

    config: ModelConfig
    arena: WeightArena
    num_vision_tensors: int

    @property
    def manifest(self) -> Manifest:
        """The arena's description."""
        return self.arena.manifest


def load_checkpoint(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: DtypeChoice | torch.dtype = "auto",
    *,
    transport: GpuTransport = "vmm",
    boot_id: str | None = None,
    progress: ProgressFn | None = None,
) -> LoadedModel:
    """Load a Qwen3.5 checkpoint folder into one sealed arena on `device`.

    `dtype`: "auto" keeps the stored types on a GPU and widens to float32 on the CPU (exact for
    bfloat16, and faster there); another choice casts all but decays and norms stored in float32.
    `transport`: how other processes will map an arena on a GPU.
    `progress(loaded_bytes, total_bytes)` is called from this thread as tensors arrive.

    Raises:
        CheckpointMismatch: a tensor is missing, unexpected or misshapen.
        UnsafeCheckpoint, CheckpointUnreadable, ModelNotFound, UnsupportedModel,
        InvalidModelConfig, OutOfDeviceMemory: the message says what is wrong with what.
    """
    folder = Path(folder)
    target = _resolve_device(device)
    config = ModelConfig.from_folder(folder)
    stored, num_vision_tensors = scan_folder(folder)
    config = replace(config, num_mtp_layers=_num_mtp_layers(config, stored))
    specs = expected_tensors(config, include_mtp=True)
    check_against(stored, specs, config.tie_word_embeddings)
    dtypes = {name: _target_dtype(stored[name].dtype, spec, target, dtype) for name, spec in specs.items()}
    entries = lay_out(specs, dtypes, config.tie_word_embeddings)
    memory = allocate(max(entry.offset + entry.nbytes for entry in entries), target, transport)
    try:
        views = arena_views(tuple(entries), memory.writable_u8())
        model_hash = _fill(views, {name: stored[name] for name in specs}, stored, progress)
        del views  # the last writable view: sealing needs it gone
        arena = finish(memory, entries, model_hash, config, target, boot_id)
    except BaseException:
        memory.close()
        raise
    return LoadedModel(config, arena, num_vision_tensors)


def _resolve_device(device: str | torch.device) -> torch.device:
    target = torch.device(device)
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ShareUnsupported(f"{target} was asked for, but torch sees no CUDA device")
        return torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)
    if target.type != "cpu":
        raise ShareUnsupported(f"weights can live on cpu or cuda, not on {target.type}")
    return target


def _num_mtp_layers(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> int:
    """None if no `mtp.` tensor is there; else as many as config.json or the names say."""
    if not any(name.startswith("mtp.") for name in stored):
        return 0
    return max(config.num_mtp_layers, count_mtp_layers(stored), 1)


def _target_dtype(
    stored: torch.dtype, spec: TensorSpec, device: torch.device, choice: DtypeChoice | torch.dtype
) -> torch.dtype:
    if choice == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if spec.keeps_fp32 and stored == torch.float32:
        return stored
    return choice if isinstance(choice, torch.dtype) else getattr(torch, choice)


def _fill(
    views: Mapping[str, torch.Tensor],
    wanted: Mapping[str, StoredTensor],
    stored: Mapping[str, StoredTensor],
    progress: ProgressFn | None,
) -> str:
    """Copy every tensor into its view; returns the model hash.

    The hash covers names, types, shapes and bytes as stored, in the order of names: it does not
    depend on how a checkpoint is cut into files, nor on the type it is loaded in.
    """
    total_bytes = sum(tensor.nbytes for tensor in wanted.values())
    loaded_bytes = 0
    digests: dict[str, str] = {}
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {tensor.file for tensor in stored.values()}
        }
        if HEAD in stored and HEAD not in wanted:
            _check_stored_head(files, stored)
        pool = stack.enter_context(ThreadPoolExecutor(num_threads, thread_name_prefix="load-weights"))
        futures = {
            pool.submit(_copy_and_hash, views[name], files[tensor.file], tensor): name
            for name, tensor in wanted.items()
        }
        for future in as_completed(futures):
            name = futures[future]
            try:
                digests[name] = future.result()
            except SafetensorError as error:
                pool.shutdown(cancel_futures=True)
                raise CheckpointUnreadable(
                    f"{name} cannot be read from {wanted[name].file.name}: {error}"
                ) from error
            loaded_bytes += wanted[name].nbytes
            if progress:
                progress(loaded_bytes, total_bytes)
    lines = (
        f"{name} {wanted[name].dtype_name} {list(wanted[name].shape)} {digests[name]}\n"
        for name in sorted(wanted)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _copy_and_hash(view: torch.Tensor, file: Any, tensor: StoredTensor) -> str:
    values = file.get_tensor(tensor.stored_name)  # backed by the mapped file, not yet read
    view.copy_(values)
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _check_stored_head(files: Mapping[Path, Any], stored: Mapping[str, StoredTensor]) -> None:
    """A tied head that was stored as well must be the embedding, or one of the two is lost."""
    head, embedding = (
        files[stored[name].file].get_tensor(stored[name].stored_name) for name in (HEAD, EMBEDDING)
    )
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise CheckpointMismatch(f"config.json ties {HEAD} to the embedding, but the stored values differ")
