"""Loads a checkpoint folder straight into an arena: checked strictly, streamed, hashed on the way.

Nothing is copied twice: a tensor goes from the mapped file to its place in the arena, cast there
if it must be. Hashing and copying run on a few threads, both without the interpreter lock; quantising
takes one matrix at a time, so that it needs little memory beside the arena.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kiln_nn.config import ModelConfig, read_json
from kiln_nn.errors import CheckpointMismatch, CheckpointUnreadable, ShareUnsupported
from kiln_nn.kernels.quantised import QuantisedMatrix, Scheme, dense, quantise_rtn
from kiln_nn.weights.arena import GpuTransport, WeightArena, allocate, finish
from kiln_nn.weights.checkpoint_files import Stored, StoredTensor, check_against, scan_folder
from kiln_nn.weights.formats import StoredMatrix, gather_matrices, stored_format
from kiln_nn.weights.manifest import SCALES_SUFFIX, Form, Manifest, lay_out, raw_views
from kiln_nn.weights.names import EMBEDDING, HEAD, canonical_name, count_mtp_layers, expected_tensors
from kiln_nn.weights.placement import DtypeChoice, Quantization, choose_forms, unquantised

ProgressFn = Callable[[int, int], None]
_MAX_THREADS = 8


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory.

    `config.num_mtp_layers` is what the weights hold: 0 where config.json promises a layer that
    was not published. `num_vision_tensors` were recognised and left out. `scheme` is that of the
    quantised layers, None where there are none; `unquantised_layers` might have it, but could not.
    """

    config: ModelConfig
    arena: WeightArena
    num_vision_tensors: int
    scheme: Scheme | None = None
    unquantised_layers: tuple[str, ...] = ()

    @property
    def manifest(self) -> Manifest:
        """The arena's description."""
        return self.arena.manifest


def load_checkpoint(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: DtypeChoice | torch.dtype = "auto",
    *,
    quantization: Quantization = "none",
    transport: GpuTransport = "vmm",
    boot_id: str | None = None,
    progress: ProgressFn | None = None,
) -> LoadedModel:
    """Load a Qwen3.5 checkpoint folder into one sealed arena on `device`.

    `dtype`: "auto" keeps the stored types on a GPU and widens to float32 on the CPU (exact for
    bfloat16, and faster there); another choice casts all but decays and norms stored in float32.
    `quantization`: rounds the decoder's large matrices to this scheme; "none" leaves them as stored,
    which may be quantised.
    `transport`: how other processes will map an arena on a GPU.
    `progress(loaded_bytes, total_bytes)` is called from this thread as tensors arrive.

    Raises:
        CheckpointMismatch: a tensor is missing, unexpected or misshapen.
        UnsupportedQuantization, InvalidQuantization: it is quantised in a way that is not read, or
            cannot be quantised as asked.
        CheckpointNotRead: the file system failed.
        UnsafeCheckpoint, CheckpointUnreadable, ModelNotFound, UnsupportedModel,
        InvalidModelConfig, OutOfDeviceMemory: the message says what is wrong with what.
    """
    folder = Path(folder)
    target = _resolve_device(device)
    config = ModelConfig.from_folder(folder)
    tensors, num_vision_tensors = scan_folder(folder)
    config = replace(config, num_mtp_layers=_num_mtp_layers(config, tensors))
    specs = expected_tensors(config, include_mtp=True)
    stored = gather_matrices(tensors, stored_format(read_json(folder / "config.json")))
    check_against(stored, specs, config.tie_word_embeddings)
    forms = choose_forms(specs, stored, target, dtype, quantization)
    entries = lay_out(specs, forms, config.tie_word_embeddings)
    memory = allocate(max(entry.offset + entry.nbytes for entry in entries), target, transport)
    try:
        views = raw_views(entries, memory.writable_u8())
        model_hash = _fill(views, forms, stored, progress)
        del views  # the last writable view: sealing needs it gone
        if target.type == "cuda":
            torch.cuda.empty_cache()  # what quantising took: the pools are cut from what is free
        arena = finish(memory, entries, model_hash, config, target, boot_id)
    except BaseException:
        memory.close()
        raise
    scheme = next((form.scheme for form in forms.values() if not isinstance(form, torch.dtype)), None)
    return LoadedModel(config, arena, num_vision_tensors, scheme, tuple(unquantised(forms)) if scheme else ())


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


def _fill(
    views: Mapping[str, torch.Tensor],
    forms: Mapping[str, Form],
    stored: Mapping[str, Stored],
    progress: ProgressFn | None,
) -> str:
    """Copy every tensor of `forms` into its view; returns the model hash.

    The hash covers names, types, shapes and bytes as stored, in the order of names: it does not
    depend on how a checkpoint is cut into files, nor on the form it is loaded in.
    """
    sizes = {name: sum(tensor.nbytes for tensor in stored[name].tensors) for name in forms}
    loaded_bytes = 0
    lines: dict[str, str] = {}
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ExitStack() as stack:
        paths = {tensor.file for one in stored.values() for tensor in one.tensors}
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        if HEAD in stored and HEAD not in forms:
            _check_stored_head(files, stored)
        pool = stack.enter_context(ThreadPoolExecutor(num_threads, thread_name_prefix="load-weights"))
        filler = _Filler(views, files)
        futures = {pool.submit(filler.fill, name, stored[name], form): name for name, form in forms.items()}
        for future in as_completed(futures):
            name = futures[future]
            try:
                lines |= future.result()
            except SafetensorError as error:
                pool.shutdown(cancel_futures=True)
                file_name = stored[name].tensors[0].file.name
                raise CheckpointUnreadable(f"{name} cannot be read from {file_name}: {error}") from error
            loaded_bytes += sizes[name]
            if progress:
                progress(loaded_bytes, sum(sizes.values()))
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


class _Filler:
    """Copies tensors from their files into the arena; its method runs on several threads."""

    def __init__(self, views: Mapping[str, torch.Tensor], files: Mapping[Path, Any]) -> None:
        self._views = views
        self._files = files
        self._one_at_a_time = threading.Lock()

    def fill(self, name: str, stored: Stored, form: Form) -> dict[str, str]:
        """Returns what goes into the model hash, by canonical name."""
        # Backed by the mapped file, not yet read.
        values = [self._files[tensor.file].get_tensor(tensor.stored_name) for tensor in stored.tensors]
        if isinstance(form, torch.dtype) and isinstance(stored, StoredTensor):
            self._views[name].copy_(values[0])
        else:
            with self._one_at_a_time:
                self._fill_computed(name, stored, values, form)
        return dict(map(_hash_line, stored.tensors, values))

    def _fill_computed(self, name: str, stored: Stored, values: list[torch.Tensor], form: Form) -> None:
        view = self._views[name]
        on_device = [tensor.to(view.device) for tensor in values]
        weight = stored.read(on_device) if isinstance(stored, StoredMatrix) else on_device[0]
        if isinstance(form, torch.dtype):
            view.copy_(dense(weight, form))
            return
        if isinstance(weight, QuantisedMatrix):
            matrix = weight
        else:
            # In the stored format, by which scales are rounded before the weights are.
            matrix = quantise_rtn(weight.to(stored.dtype), form.scheme)
        view.copy_(matrix.values)
        self._views[name + SCALES_SUFFIX].copy_(matrix.scales)


def _hash_line(tensor: StoredTensor, values: Any) -> tuple[str, str]:
    name = canonical_name(tensor.stored_name)
    assert name is not None
    digest = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy()).hexdigest()
    return name, f"{name} {tensor.dtype_name} {list(tensor.shape)} {digest}\n"


def _check_stored_head(files: Mapping[Path, Any], stored: Mapping[str, Stored]) -> None:
    """A tied head that was stored as well must be the embedding, or one of the two is lost."""
    tensors = [stored[name].tensors[0] for name in (HEAD, EMBEDDING)]
    head, embedding = (files[tensor.file].get_tensor(tensor.stored_name) for tensor in tensors)
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise CheckpointMismatch(f"config.json ties {HEAD} to the embedding, but the stored values differ")
