"""What a backend says of its memory, against what a job really takes."""

import pytest
import safetensors.torch
import torch

from kiln_trainer.domain.capacity import memory_needs
from kiln_trainer.torch_backend import activation_memory
from kiln_trainer.torch_backend.backend import TorchBackend
from tests.support.training import RecordingHooks, served_model, sft_request, task


def lora_shapes(content):
    """(in, out) of every adapted layer of a result, and its number of parameters."""
    tensors = safetensors.torch.load(bytes(content.view()))
    shapes = {}
    for name, tensor in tensors.items():
        path, _, matrix = name.removesuffix(".weight").rpartition(".")
        shapes.setdefault(path, {})[matrix] = tensor.shape
    sizes = [(pair["lora_A"][1], pair["lora_B"][0]) for pair in shapes.values()]
    return sizes, sum(tensor.numel() for tensor in tensors.values())


def test_memory_is_known_once_the_weights_are_mapped_and_warm(served, tmp_path):
    backend = TorchBackend(served.locate)
    assert backend.capacity is None
    backend.keep_mapped()
    capacity = backend.capacity
    assert capacity.base_shared_bytes == backend.mapped_model.num_borrowed_bytes > 0
    assert capacity.base_copied_bytes == 0
    assert capacity.available_bytes > 2**20
    assert capacity.token_bytes > 0
    result = backend.run(task(sft_request([[1, 2, 3, 4]]), tmp_path), RecordingHooks())
    sizes, num_parameters = lora_shapes(result.content)
    needs = memory_needs(capacity, 4, sizes, 4)
    assert needs.adapter_bytes == 4 * num_parameters
    assert {"torch", "python", "kiln", "device", "weights_dtype"} <= backend.environment.keys()
    backend.close()
    assert backend.capacity is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_job_that_recomputes_its_layers_takes_no_more_than_was_said(tmp_path, monkeypatch):
    with served_model(tmp_path, "cuda:0") as served:
        backend = TorchBackend(served.locate)
        backend.keep_mapped()
        monkeypatch.setattr(activation_memory, "_budget_bytes", lambda device: 0)
        num_tokens = 2_048
        request = sft_request([[token % 300 for token in range(num_tokens)]], batch_tokens=num_tokens)
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        result = backend.run(task(request, tmp_path / "job"), RecordingHooks())
        peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
        sizes, _ = lora_shapes(result.content)
        needs = memory_needs(backend.capacity, 4, sizes, num_tokens)
        print(f"peak {peak_bytes}, said {needs}")
        assert peak_bytes <= needs.total_bytes
        backend.close()
