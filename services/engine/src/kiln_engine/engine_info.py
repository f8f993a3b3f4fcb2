"""What an engine says of itself: its model, its device, its room."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import structlog
import torch

from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.text.vocabulary import vocabulary_hash
from kiln_engine.checkpoint_identity import model_name, stop_token_ids
from kiln_engine.execution.memory_plan import MemoryPlan
from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.settings import EngineSettings
from kiln_nn.lora import adapter_table, mtp_table
from kiln_nn.weights import LoadedModel

log = structlog.get_logger()

_MACHINE_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def engine_info(
    settings: EngineSettings,
    folder: Path,
    model: LoadedModel,
    memory: MemoryPlan,
    limits: SchedulerLimits,
    *,
    device: torch.device,
    dtype: torch.dtype,
    adapter_socket_path: Path,
) -> engine_pb2.EngineInfo:
    """The answer to GetInfo, the same for as long as the engine lives. `dtype` is that of its embeddings."""
    return engine_pb2.EngineInfo(
        base_model=_base_model(settings, folder, model, limits),
        boot_id=model.manifest.boot_id,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        page_tokens=memory.page_tokens,
        num_pages=memory.num_pages,
        num_state_slots=memory.num_state_slots,
        num_adapter_slots=memory.num_adapter_slots,
        max_adapter_rank=memory.max_adapter_rank,
        max_running=limits.num_most_running,
        adapter_socket_path=str(adapter_socket_path),
        weights_scheme=model.scheme or "",
        speculation="" if settings.speculation == "none" else settings.speculation,
        device_id=_device_id(model.manifest.device_id),
    )


def model_id(settings: EngineSettings, folder: Path) -> str:
    """The base model's id in the API."""
    return settings.served_model_name or model_name(settings.model_path, folder)


def _base_model(
    settings: EngineSettings, folder: Path, model: LoadedModel, limits: SchedulerLimits
) -> common_pb2.BaseModel:
    return common_pb2.BaseModel(
        model_id=model_id(settings, folder),
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


def _device_id(weights_device_id: str) -> str:
    """Engines with one device have one id; two containers of a machine share its memory."""
    if weights_device_id != "cpu":
        return weights_device_id
    try:
        return f"cpu:{_MACHINE_BOOT_ID.read_text(encoding='ascii').strip()}"
    except OSError:
        return f"cpu:{socket.gethostname()}"
