"""The backend of a trainer process: which engine, which device, and how the device is shared."""

from __future__ import annotations

import torch

from kiln_common.settings import ConfigurationError
from kiln_trainer.domain.gpu_share import Shares
from kiln_trainer.settings import TrainerSettings
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.engine_load import EngineLoadReader
from kiln_trainer.torch_backend.gpu_share import GpuShare, LoadWatch, make_share
from kiln_trainer.torch_backend.weights import WeightSession


class TrainerDeviceNotAvailable(ConfigurationError):
    """The trainer's own GPU is not there."""

    code = "trainer_device_not_available"
    hint = "Leave KILN_TRAINER_DEVICE out to train on the engine's device."


def backend_from_settings(settings: TrainerSettings) -> TorchBackend:
    """A backend on the weights of the first engine.

    Raises:
        TrainerDeviceNotAvailable: the settings name a GPU that torch does not see.
    """
    address = settings.engine_addresses[0]
    device = torch.device(settings.device) if settings.device else None
    if device is not None:
        num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index >= num_devices:
            raise TrainerDeviceNotAvailable(f"{device} was asked for, and torch sees {num_devices} GPUs")
    shares = Shares(settings.gpu_share_idle, settings.gpu_share_light, settings.gpu_share_heavy)

    def share_of(session: WeightSession) -> GpuShare:
        watch = LoadWatch(EngineLoadReader(address), shares, settings.gpu_yield_s)
        return make_share(settings.gpu_sharing, session.device, watch, is_own_device=session.is_own_device)

    return TorchBackend.for_engine(
        address, num_threads=settings.num_threads, device=device, make_share=share_of
    )
