"""A device that is not there is an error of the configuration, said before anything is loaded."""

import pytest
import torch

from kiln_common.settings import ConfigurationError
from kiln_engine import device_choice
from kiln_engine.device_choice import DeviceNotAvailable, SettingsContradict
from kiln_engine.device_side import load_device_side
from kiln_engine.settings import EngineSettings
from tests.support.tiny_models import make_checkpoint


@pytest.mark.parametrize(("cuda_version", "reason"), [("12.8", "sees no GPU"), (None, "built for CPUs only")])
def test_cuda_without_a_gpu_is_refused(monkeypatch, cuda_version, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    with pytest.raises(DeviceNotAvailable, match=reason) as refused:
        load_device_side(EngineSettings(model_path="/nowhere", device="cuda"))
    assert isinstance(refused.value, ConfigurationError)
    assert refused.value.code == "device_not_available"
    assert "out to use the CPU" in refused.value.hint


def test_drafts_by_a_layer_that_the_checkpoint_lacks_are_refused(tmp_path):
    make_checkpoint(tmp_path / "model", num_mtp_layers=0)
    settings = EngineSettings(
        model_path=str(tmp_path / "model"), device="cpu", speculation="mtp", socket_dir=tmp_path / "run"
    )
    with pytest.raises(SettingsContradict, match="multi-token-prediction layer; the checkpoint has none"):
        load_device_side(settings)


def test_fp8_keys_and_values_are_refused_where_no_kernel_reads_them(monkeypatch):
    settings = EngineSettings(model_path="/nowhere", device="cpu", kv_dtype="fp8")
    with pytest.raises(SettingsContradict, match="the device is the CPU"):
        load_device_side(settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(SettingsContradict, match=r"needs compute capability 8\.9; the GPU has 8\.0"):
        load_device_side(EngineSettings(model_path="/nowhere", device="cuda", kv_dtype="fp8"))


def test_batch_invariance_and_speculation_are_refused_together():
    settings = EngineSettings(model_path="/nowhere", device="cpu", batch_invariant=True, speculation="ngram")
    with pytest.raises(SettingsContradict, match="batch_invariant and speculation exclude each other"):
        load_device_side(settings)


def test_batch_invariance_is_refused_where_no_kernel_is_cut_alike_for_every_batch(monkeypatch):
    cuda, check = torch.device("cuda"), device_choice.check_batch_invariant
    monkeypatch.setattr(device_choice, "why_no_kernels", lambda _: None)
    check(cuda, torch.bfloat16, 16)
    with pytest.raises(SettingsContradict, match="but the format is float16"):
        check(cuda, torch.float16, 16)
    with pytest.raises(SettingsContradict, match="but page_tokens is 4, not one of 8, 16, 32, 64"):
        check(cuda, torch.bfloat16, 4)
    monkeypatch.setattr(device_choice, "why_no_kernels", lambda _: "Triton is not installed")
    with pytest.raises(SettingsContradict, match="but Triton is not installed"):
        check(cuda, torch.bfloat16, 16)
    check(torch.device("cpu"), torch.float32, 4)
