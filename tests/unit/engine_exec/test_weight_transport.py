"""By which transport the engine lets a trainer map its weights on a GPU."""

import pytest
import torch

from kiln_engine import device_choice
from kiln_nn.weights import vmm_memory

GPU = torch.device("cuda", 0)
REASON = "cuMemCreate failed with CUDA_ERROR_NOT_PERMITTED (800)"


@pytest.mark.parametrize(
    ("choice", "reason", "expected"),
    [
        ("auto", None, "vmm"),
        ("auto", REASON, "legacy"),
        ("vmm", REASON, "vmm"),  # as asked for: loading will fail with the reason
        ("legacy", None, "legacy"),
    ],
)
def test_handles_stand_in_for_descriptors_only_where_those_do_not_work(monkeypatch, choice, reason, expected):
    monkeypatch.setattr(vmm_memory, "why_not", lambda device: reason)
    assert device_choice.gpu_transport(choice, GPU) == expected


def test_a_cpu_is_not_asked(monkeypatch):
    monkeypatch.setattr(vmm_memory, "why_not", lambda device: pytest.fail("there is no driver to ask"))
    assert device_choice.gpu_transport("auto", torch.device("cpu")) == "vmm"
