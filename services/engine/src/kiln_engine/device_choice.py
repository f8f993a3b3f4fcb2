"""Which device serves, and what of the settings it or the checkpoint cannot do."""

from __future__ import annotations

from typing import Literal

import structlog
import torch

from kiln_common.settings import ConfigurationError
from kiln_engine.settings import EngineSettings
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.dispatch import why_no_kernels
from kiln_nn.weights import vmm_memory
from kiln_nn.weights.arena import GpuTransport

log = structlog.get_logger()

_PAGES_OF_KERNELS = (8, 16, 32, 64)
_OLDEST_FP8_CAPABILITY = (8, 9)


class DeviceNotAvailable(ConfigurationError):
    """The device that was asked for is not there."""

    code = "device_not_available"
    hint = "Leave --device (KILN_ENGINE_DEVICE) out to use the CPU."


class SettingsContradict(ConfigurationError):
    """Two settings exclude each other, or one asks for what this device or checkpoint cannot do."""

    code = "settings_contradict"
    hint = "Change the KILN_ENGINE_ settings that the message names, or leave them to the engine."


def choose_device(choice: str) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "PyTorch sees no GPU" if torch.version.cuda else "the installed PyTorch is built for CPUs only"
        raise DeviceNotAvailable(f"the device {choice} was asked for, but {why}")
    return torch.device("cuda", 0)


def check_settings(settings: EngineSettings, device: torch.device) -> None:
    """Raises SettingsContradict for what can be told before the checkpoint is read."""
    if settings.kv_dtype == "fp8":
        _check_fp8(device)
    if settings.batch_invariant and settings.speculation != "none":
        raise SettingsContradict(
            "batch_invariant and speculation exclude each other: how far it guesses varies"
        )


def check_model(
    settings: EngineSettings, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises SettingsContradict for what this checkpoint, in this format, cannot do there."""
    if settings.batch_invariant:
        check_batch_invariant(device, dtype, settings.page_tokens)
    if settings.speculation == "mtp":
        _check_mtp(config)


def gpu_transport(choice: Literal["auto", "vmm", "legacy"], device: torch.device) -> GpuTransport:
    """How the arena will be mapped; legacy handles only where asked for, or where descriptors do not work."""
    if choice != "auto" or device.type == "cpu":
        return "legacy" if choice == "legacy" else "vmm"
    reason = vmm_memory.why_not(device)
    if reason is None:
        return "vmm"
    log.warning("weights_not_protected", reason=reason, effect="the trainer maps them by a legacy handle")
    return "legacy"


def has_kernels(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    reason = why_no_kernels(device)
    if reason is not None:
        log.warning(
            "kernels_unavailable", reason=reason, effect="steps run on the references, many times slower"
        )
    return reason is None


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
