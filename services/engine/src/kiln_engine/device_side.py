"""Loads the model and cuts the device's memory: the part of the start that needs torch."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import structlog
import torch

from kiln_common.errors import KilnError
from kiln_common.model_folder import find_model_folder
from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.settings import ConfigurationError
from kiln_common.text.vocabulary import vocabulary_hash
from kiln_engine.bootstrap import EngineParts
from kiln_engine.checkpoint_identity import model_name, stop_token_ids
from kiln_engine.domain.batch_sizes import decode_ladder
from kiln_engine.domain.device_memory import DeviceMemory
from kiln_engine.execution.free_memory import free_bytes_for_pools
from kiln_engine.execution.memory_plan import MemoryPlan, MemoryRequest, NotEnoughMemory, plan_memory
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.grammar import ThreadedCompiler
from kiln_engine.load_progress import LoadProgress
from kiln_engine.model.small_head import make_small_head
from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.settings import EngineSettings
from kiln_nn.blocks import head_weight
from kiln_nn.config import ModelConfig
from kiln_nn.errors import InvalidQuantization, KilnNnError
from kiln_nn.kernels.dispatch import why_no_kernels
from kiln_nn.lora import adapter_table, mtp_table
from kiln_nn.sharing import AdapterInbox, WeightServer, wait_for_old_leases
from kiln_nn.weights import LoadedModel, WeightArena, load_checkpoint, vmm_memory
from kiln_nn.weights.arena import GpuTransport

log = structlog.get_logger()

_CPU_KV_CACHE_TOKENS = 65_536
# A shorter context than this is not worth starting with, unless the settings ask for it.
_LEAST_MODEL_LEN = 4096
# Of a prompt, where chunks are fixed: as long as a graph holds, and prompts are cached in such parts.
_MOST_FIXED_CHUNK_TOKENS = 256
_PAGES_OF_KERNELS = (8, 16, 32, 64)
_OLDEST_FP8_CAPABILITY = (8, 9)
_MACHINE_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SOCKET_NAME = "weights.sock"
_INBOX_NAME = "adapters.sock"


class ModelNotLoaded(KilnError):
    """The checkpoint cannot be served; code and hint say why."""

    def __init__(self, error: KilnNnError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.code = error.code


class SettingsUnfit(ConfigurationError):
    """What the settings ask cannot be done with this checkpoint; code and hint say why."""

    def __init__(self, error: KilnNnError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.code = error.code


class DeviceNotAvailable(ConfigurationError):
    """The device that was asked for is not there."""

    code = "device_not_available"
    hint = "Leave --device (KILN_ENGINE_DEVICE) out to use the CPU."


class SettingsContradict(ConfigurationError):
    code = "settings_contradict"
    hint = "Change the KILN_ENGINE_ settings that the message names, or leave them to the engine."


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


def load_device_side(settings: EngineSettings) -> EngineParts:
    """Load the checkpoint, share its weights and allocate the pools. Takes as long as the disk does.

    Raises:
        ModelNotLoaded, NotEnoughMemory, DeviceNotAvailable, SettingsContradict, SettingsUnfit: with what is
            wrong and what to do.
    """
    torch.set_num_threads(settings.num_threads)
    device = _choose_device(settings.device)
    if settings.kv_dtype == "fp8":
        _check_fp8(device)
    if settings.batch_invariant and settings.speculation != "none":
        raise SettingsContradict(
            "batch_invariant and speculation exclude each other: how far it guesses varies"
        )
    boot_id = secrets.token_hex(16)
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
            transport=_gpu_transport(settings.weight_transport, device),
            boot_id=boot_id,
            progress=LoadProgress(folder.name),
        )
        weights = SharedArena(model.arena, socket_path)
        inbox = AdapterInbox(settings.socket_dir / _INBOX_NAME)
        views = model.arena.views()
        small_head = make_small_head(head_weight(model.config, views), settings.head_quantization)
    except InvalidQuantization as error:
        raise SettingsUnfit(error) from error
    except KilnNnError as error:
        raise ModelNotLoaded(error) from error
    weights_bytes = model.manifest.nbytes + (small_head.nbytes if small_head else 0)
    dtype = views["model.embed_tokens.weight"].dtype
    if settings.batch_invariant:
        check_batch_invariant(device, dtype, settings.page_tokens)
    if settings.speculation == "mtp":
        _check_mtp(model.config)
    request = _memory_request(settings, model, device)
    free_bytes = free_bytes_for_pools(device, settings.gpu_memory_fraction, weights_bytes)
    memory = plan_memory(model.config, request, dtype, free_bytes)
    try:
        limits = SchedulerLimits(
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
    has_graphs = request.has_kernels and settings.cuda_graphs
    _log_plan(model, memory, limits, dtype, decode_ladder(memory.max_running) if has_graphs else [])
    info = engine_pb2.EngineInfo(
        base_model=_base_model(settings, folder, model, limits),
        boot_id=boot_id,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        page_tokens=memory.page_tokens,
        num_pages=memory.num_pages,
        num_state_slots=memory.num_state_slots,
        num_adapter_slots=memory.num_adapter_slots,
        max_adapter_rank=memory.max_adapter_rank,
        max_running=limits.num_most_running,
        adapter_socket_path=str(inbox.socket_path),
        weights_scheme=model.scheme or "",
        speculation="" if settings.speculation == "none" else settings.speculation,
        device_id=_device_id(model.manifest.device_id),
    )
    runner = TorchRunner(
        model.config,
        views,
        memory,
        small_head=small_head,
        is_batch_invariant=settings.batch_invariant,
        mtp_hidden=settings.mtp_hidden,
        draft_vocab_tokens=settings.draft_vocab_tokens or None,
    )
    if has_graphs:
        _capture(runner)
    grammars = _grammars(folder, info, settings.grammar_time_limit_s)
    usage = _device_memory(device, weights_bytes, memory)
    return EngineParts(runner, runner.adapters, weights, limits, info, inbox, grammars, usage)


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


def _device_id(manifests: str) -> str:
    """Engines with one device have one id; two containers of a machine share its memory."""
    if manifests != "cpu":
        return manifests
    try:
        return f"cpu:{_MACHINE_BOOT_ID.read_text(encoding='ascii').strip()}"
    except OSError:
        return f"cpu:{socket.gethostname()}"


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


def _capture(runner: TorchRunner) -> None:
    """Capture the steps' graphs; an engine whose model or GPU does not allow it is slow, not broken."""
    try:
        started_s = time.monotonic()
        num_bytes = runner.capture()
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


def _choose_device(choice: str) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "PyTorch sees no GPU" if torch.version.cuda else "the installed PyTorch is built for CPUs only"
        raise DeviceNotAvailable(f"the device {choice} was asked for, but {why}")
    return torch.device("cuda", 0)


def _gpu_transport(choice: Literal["auto", "vmm", "legacy"], device: torch.device) -> GpuTransport:
    """How the arena will be mapped; legacy handles only where asked for, or where descriptors do not work."""
    if choice != "auto" or device.type == "cpu":
        return "legacy" if choice == "legacy" else "vmm"
    reason = vmm_memory.why_not(device)
    if reason is None:
        return "vmm"
    log.warning("weights_not_protected", reason=reason, effect="the trainer maps them by a legacy handle")
    return "legacy"


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
        has_kernels=_has_kernels(device),
        has_quantised_weights=model.scheme is not None,
        has_quantised_head=settings.head_quantization != "none",
    )


def _check_mtp(config: ModelConfig) -> None:
    """Raises SettingsContradict where the checkpoint has no such layer, or several."""
    if config.num_mtp_layers != 1:
        raise SettingsContradict(
            f"speculation is mtp, which needs one multi-token-prediction layer; the checkpoint has"
            f" {config.num_mtp_layers or 'none'}. ngram needs none"
        )


def _check_fp8(device: torch.device) -> None:
    """Raises SettingsContradict where no kernel reads keys and values in fp8."""
    if device.type == "cpu":
        raise SettingsContradict("kv_dtype is fp8, which needs a GPU, and the device is the CPU")
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_FP8_CAPABILITY:
        has, needed = (".".join(map(str, pair)) for pair in (capability, _OLDEST_FP8_CAPABILITY))
        raise SettingsContradict(
            f"kv_dtype is fp8, which needs compute capability {needed}; the GPU has {has}"
        )


def check_batch_invariant(device: torch.device, dtype: torch.dtype, page_tokens: int) -> None:
    """Raises SettingsContradict where no kernels are that cut every batch alike; a CPU needs none."""
    if device.type == "cpu":
        return
    why = why_no_kernels(device)
    if why is None and dtype is not torch.bfloat16:
        why = f"the format is {str(dtype).removeprefix('torch.')}"
    if why is None and page_tokens not in _PAGES_OF_KERNELS:
        why = f"page_tokens is {page_tokens}, not one of {', '.join(map(str, _PAGES_OF_KERNELS))}"
    if why is not None:
        raise SettingsContradict(f"batch_invariant needs the kernels for bfloat16 on a GPU, but {why}")


def fixed_chunk_tokens(memory: MemoryPlan) -> int:
    """The most tokens, up to a bound, that are whole pages and fit a step in which everybody decodes."""
    fitting = min(_MOST_FIXED_CHUNK_TOKENS, memory.step_token_budget - memory.max_running)
    return max(fitting // memory.page_tokens, 1) * memory.page_tokens


def _has_kernels(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    reason = why_no_kernels(device)
    if reason is not None:
        log.warning(
            "kernels_unavailable", reason=reason, effect="steps run on the references, many times slower"
        )
    return reason is None


def _base_model(
    settings: EngineSettings, folder: Path, model: LoadedModel, limits: SchedulerLimits
) -> common_pb2.BaseModel:
    return common_pb2.BaseModel(
        model_id=settings.served_model_name or model_name(settings.model_path, folder),
        model_hash=model.manifest.model_hash,
        vocab_size=model.config.vocab_size,
        max_model_len=limits.max_num_tokens,
        eos_token_ids=stop_token_ids(folder, model.config.eos_token_ids),
        adaptable_modules=_modules(adapter_table(model.config)),
        vocabulary_hash=_vocabulary_hash(folder),
        draft_modules=_modules(mtp_table(model.config)),
    )


def _modules(table: Mapping[str, tuple[int, int]]) -> list[common_pb2.AdaptableModule]:
    return [
        common_pb2.AdaptableModule(path=path, in_features=inputs, out_features=outputs)
        for path, (inputs, outputs) in table.items()
    ]


def _vocabulary_hash(folder: Path) -> str:
    """Without it the model can serve, and neither teach another engine's nor learn from it."""
    try:
        return vocabulary_hash(folder)
    except (ValueError, OSError) as error:
        log.warning("vocabulary_unknown", reason=str(error))
        return ""


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
