"""Loads the model and cuts the device's memory: the part of the start that needs torch."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch

from kiln_common.errors import KilnError
from kiln_common.model_folder import find_model_folder
from kiln_common.pb import engine_pb2
from kiln_common.settings import ConfigurationError
from kiln_engine.bootstrap import EngineParts
from kiln_engine.device_choice import (
    SettingsContradict,
    check_model,
    check_settings,
    choose_device,
    gpu_transport,
    has_kernels,
)
from kiln_engine.domain.batch_sizes import decode_ladder
from kiln_engine.domain.device_memory import DeviceMemory
from kiln_engine.engine_info import engine_info
from kiln_engine.execution.free_memory import free_bytes_for_pools
from kiln_engine.execution.memory_plan import MemoryPlan, MemoryRequest, NotEnoughMemory, plan_memory
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.grammar import ThreadedCompiler
from kiln_engine.load_progress import LoadProgress
from kiln_engine.model.small_head import make_small_head
from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.settings import EngineSettings
from kiln_nn.blocks import Weights, head_weight
from kiln_nn.errors import CheckpointRefused, KilnNnError
from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.compile_ahead import usable_cores
from kiln_nn.kernels.quantised import QuantisedMatrix
from kiln_nn.sharing import AdapterInbox, WeightServer, wait_for_old_leases
from kiln_nn.weights import LoadedModel, WeightArena, load_checkpoint

log = structlog.get_logger()

_CPU_KV_CACHE_TOKENS = 65_536
# A shorter context than this is not worth starting with, unless the settings ask for it.
_LEAST_MODEL_LEN = 4096
# Of a prompt, where chunks are fixed: as long as a graph holds, and prompts are cached in such parts.
_MOST_FIXED_CHUNK_TOKENS = 256
# More would wait for Python's lock, which a kernel's compilation holds for a tenth of its time or more.
_MOST_COMPILE_THREADS = 16
_SOCKET_NAME = "weights.sock"
_INBOX_NAME = "adapters.sock"


class ModelNotLoaded(ConfigurationError):
    """The checkpoint cannot be served, or not as the settings ask; code and hint say why."""

    def __init__(self, error: KilnNnError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.code = error.code


class WeightsNotPlaced(KilnError):
    """The device or its driver did not take the weights now; code and hint say why."""

    def __init__(self, error: KilnNnError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.code = error.code


class SharedArena:
    """The arena as the servicer knows it, and its socket while it is served."""

    def __init__(self, arena: WeightArena, socket_path: Path) -> None:
        self._arena = arena
        self._server = WeightServer(arena, socket_path, _log_leases)
        self.socket_path = str(socket_path)

    @property
    def num_leases(self) -> int:
        return self._server.num_leases

    @property
    def num_bytes(self) -> int:
        return self._arena.manifest.nbytes

    def checksum(self) -> str:
        return self._arena.checksum()

    def close(self) -> None:
        self._server.close()


@dataclass(frozen=True)
class LoadedWeights:
    """The checkpoint on its device, and the sockets over which weights and adapters are handed over."""

    folder: Path
    model: LoadedModel
    views: Weights
    small_head: QuantisedMatrix | None
    arena: SharedArena
    inbox: AdapterInbox

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised."""
        return self.views["model.embed_tokens.weight"].dtype

    @property
    def num_bytes(self) -> int:
        return self.model.manifest.nbytes + (self.small_head.nbytes if self.small_head else 0)


def load_device_side(settings: EngineSettings) -> EngineParts:
    """Load the checkpoint, share its weights and allocate the pools. Takes as long as the disk does.

    Raises:
        ModelFolderMissing, HubFailed, ModelNotLoaded, WeightsNotPlaced, NotEnoughMemory,
            DeviceNotAvailable, SettingsContradict: with what is wrong and what to do.
    """
    torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.device)
    check_settings(settings, device)
    weights = _load_weights(settings, device)
    model, dtype = weights.model, weights.dtype
    check_model(settings, model.config, device, dtype)
    request = _memory_request(settings, model, device)
    free_bytes = free_bytes_for_pools(device, settings.gpu_memory_fraction, weights.num_bytes)
    memory = plan_memory(model.config, request, dtype, free_bytes)
    limits = _limits(settings, request, memory)
    has_graphs = request.has_kernels and settings.cuda_graphs
    _log_plan(model, memory, limits, dtype, decode_ladder(memory.max_running) if has_graphs else [])
    info = engine_info(
        settings,
        weights.folder,
        model,
        memory,
        limits,
        device=device,
        dtype=dtype,
        adapter_socket_path=weights.inbox.socket_path,
    )
    runner = _runner(settings, weights, memory)
    if has_graphs:
        _capture(runner, settings.compile_threads or min(usable_cores(), _MOST_COMPILE_THREADS))
    grammars = _grammars(weights.folder, info, settings.grammar_time_limit_s)
    usage = _device_memory(device, weights.num_bytes, memory)
    return EngineParts(runner, runner.adapters, weights.arena, limits, info, weights.inbox, grammars, usage)


def _load_weights(settings: EngineSettings, device: torch.device) -> LoadedWeights:
    """Raises ModelFolderMissing, HubFailed, ModelNotLoaded, WeightsNotPlaced."""
    socket_path = settings.socket_dir / _SOCKET_NAME
    try:
        folder = find_model_folder(settings.model_path)
        if device.type == "cuda" and not wait_for_old_leases(socket_path, settings.old_lease_wait_s):
            log.warning("old_weights_still_mapped", waited_s=settings.old_lease_wait_s)
        model = load_checkpoint(
            folder,
            device,
            settings.dtype,
            quantization=settings.quantization,
            transport=gpu_transport(settings.weight_transport, device),
            boot_id=secrets.token_hex(16),
            progress=LoadProgress(folder.name),
        )
        arena = SharedArena(model.arena, socket_path)
        inbox = AdapterInbox(settings.socket_dir / _INBOX_NAME)
        views = model.arena.views()
        small_head = make_small_head(head_weight(model.config, views), settings.head_quantization)
    except (CheckpointRefused, ShapeMismatch) as error:
        raise ModelNotLoaded(error) from error
    except KilnNnError as error:
        raise WeightsNotPlaced(error) from error
    return LoadedWeights(folder, model, views, small_head, arena, inbox)


def _limits(settings: EngineSettings, request: MemoryRequest, memory: MemoryPlan) -> SchedulerLimits:
    """Raises SettingsContradict."""
    try:
        return SchedulerLimits(
            num_pages=memory.num_pages,
            num_state_slots=memory.num_state_slots,
            max_model_len=request.max_model_len,
            max_running=request.max_running,
            step_token_budget=request.step_token_budget,
            page_tokens=memory.page_tokens,
            checkpoint_interval_tokens=settings.checkpoint_interval_tokens,
            fixed_chunk_tokens=fixed_chunk_tokens(memory) if settings.batch_invariant else 0,
            max_draft_tokens=memory.max_draft_tokens,
        )
    except ValueError as error:
        raise SettingsContradict(str(error)) from error


def _runner(settings: EngineSettings, weights: LoadedWeights, memory: MemoryPlan) -> TorchRunner:
    return TorchRunner(
        weights.model.config,
        weights.views,
        memory,
        small_head=weights.small_head,
        is_batch_invariant=settings.batch_invariant,
        mtp_hidden=settings.mtp_hidden,
        draft_vocab_tokens=settings.draft_vocab_tokens or None,
    )


def _device_memory(device: torch.device, weights_bytes: int, memory: MemoryPlan) -> DeviceMemory:
    parts = {
        "weights": weights_bytes,
        "kv": memory.kv_bytes + memory.page_table_bytes,
        "states": memory.state_bytes,
        "adapters": memory.adapter_bytes,
        "workspace": memory.workspace_bytes,
    }
    if device.type == "cpu":
        return DeviceMemory(parts, _machine_memory)
    return DeviceMemory(parts, partial(torch.cuda.mem_get_info, device))


def _machine_memory() -> tuple[int, int]:
    """Free and total bytes of this machine."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes


def _grammars(folder: Path, info: engine_pb2.EngineInfo, time_limit_s: float) -> ThreadedCompiler | None:
    """The compiler of grammars for the checkpoint's tokenizer, if it has one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    model = info.base_model
    return ThreadedCompiler(
        path, vocab_size=model.vocab_size, end_token_ids=model.eos_token_ids, time_limit_s=time_limit_s
    )


def _capture(runner: TorchRunner, num_compile_threads: int) -> None:
    """Capture the steps' graphs; an engine whose model or GPU does not allow it is slow, not broken."""
    try:
        started_s = time.monotonic()
        num_bytes = runner.capture(num_compile_threads)
    except Exception as error:  # whatever a kernel or the driver has against it
        if is_out_of_memory(error):
            raise NotEnoughMemory(f"no memory is left for CUDA graphs: {error}") from error
        log.warning("cuda_graphs_unavailable", reason=str(error), exc_info=error)
    else:
        log.info("cuda_graphs", mib=num_bytes >> 20, seconds=round(time.monotonic() - started_s, 1))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device ran out of memory: a capture that fails on it ends in an error of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _memory_request(settings: EngineSettings, model: LoadedModel, device: torch.device) -> MemoryRequest:
    is_cpu = device.type == "cpu"
    longest = model.config.max_position_embeddings
    return MemoryRequest(
        page_tokens=settings.page_tokens,
        max_model_len=min(settings.max_model_len or longest, longest),
        least_model_len=min(settings.max_model_len or _LEAST_MODEL_LEN, longest),
        max_running=settings.max_running or (32 if is_cpu else 256),
        step_token_budget=settings.step_token_budget or (512 if is_cpu else 8192),
        num_adapter_slots=settings.num_adapter_slots,
        max_adapter_rank=settings.max_adapter_rank,
        num_state_slots=settings.num_state_slots,
        max_draft_tokens=0 if settings.speculation == "none" else settings.max_draft_tokens,
        drafts_by_mtp=settings.speculation == "mtp",
        kv_cache_tokens=settings.kv_cache_tokens or (_CPU_KV_CACHE_TOKENS if is_cpu else 0),
        state_dtype=torch.bfloat16 if settings.state_dtype == "bfloat16" else torch.float32,
        kv_dtype=torch.float8_e4m3fn if settings.kv_dtype == "fp8" else None,
        has_kernels=has_kernels(device),
        has_quantised_weights=model.scheme is not None,
        has_quantised_head=settings.head_quantization != "none",
    )


def fixed_chunk_tokens(memory: MemoryPlan) -> int:
    """The most tokens, up to a bound, that are whole pages and fit a step in which everybody decodes."""
    fitting = min(_MOST_FIXED_CHUNK_TOKENS, memory.step_token_budget - memory.max_running)
    return max(fitting // memory.page_tokens, 1) * memory.page_tokens


def _log_plan(
    model: LoadedModel,
    memory: MemoryPlan,
    limits: SchedulerLimits,
    dtype: torch.dtype,
    graph_sizes: list[int],
) -> None:
    if model.unquantised_layers:
        layers = model.unquantised_layers
        log.warning("layers_not_quantised", scheme=model.scheme, count=len(layers), first=layers[0])
    if model.scheme and model.manifest.device_id == "cpu":
        log.warning(
            "quantised_weights_slow",
            scheme=model.scheme,
            effect="on a CPU each product makes its matrix whole again, many times slower than plain weights",
            hint="serve the plain checkpoint here, without --quantization; docs/quantization.md has figures",
        )
    log.info(
        "memory_plan",
        weights_mib=model.manifest.nbytes >> 20,
        weights_scheme=model.scheme or "none",
        weights_transport=model.manifest.transport,
        weights_dtype=str(dtype).removeprefix("torch."),
        kv_mib=memory.kv_bytes >> 20,
        kv_tokens=memory.num_pages * memory.page_tokens,
        state_mib=memory.state_bytes >> 20,
        state_slots=memory.num_state_slots,
        state_dtype=str(memory.state_dtype).removeprefix("torch."),
        kv_dtype=str(memory.kv_dtype).removeprefix("torch."),
        adapter_mib=memory.adapter_bytes >> 20,
        adapter_slots=memory.num_adapter_slots,
        workspace_mib=memory.workspace_bytes >> 20,
        max_running=limits.num_most_running,
        max_model_len=limits.max_num_tokens,
        graph_sizes=",".join(map(str, graph_sizes)) or "none",
    )


def _log_leases(num_leases: int) -> None:
    log.info("weight_leases", count=num_leases)
