"""Training through the kernels: every LoRA gradient against float64 in plain torch.

The model is small, but its widths are ones the kernels take. On a GPU, and in Triton's interpreter.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kiln_nn.kernels.logprobs import token_logprobs
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from tests.support.delta_inputs import relative_error
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import random_tensors, tiny_config
from tests.support.triton_kernels import (
    INTERPRETED,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    run_under_interpreter,
    trust_backward_kernels,
)

only_on_gpu = pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")
LENGTHS = (200, 3, 64, 131)
FIELDS = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "layer_types": ("linear_attention", "linear_attention", "full_attention", "linear_attention"),
}


@pytest.fixture(autouse=True)
def _trust(monkeypatch):
    trust_backward_kernels(monkeypatch)


def _documents(vocab_size: int, lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(21)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]


def _gradients(
    config, weights: dict, documents: list[torch.Tensor], device: str, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Of every LoRA tensor, for a loss with signs as advantages have, on one packed batch."""
    lora = random_lora(config, rank=8, dtype=dtype)
    pairs = {path: (a.to(device), b.to(device)) for path, (a, b) in lora.tensors().items()}
    lora = LoraParameters(lora.spec, pairs)
    # All layers but the last are computed again in the backward pass.
    model = PackedModel(config, {name: t.to(device) for name, t in weights.items()}, num_kept_layers=1)
    ids = torch.cat(documents).to(device)
    bounds = (0, *torch.tensor([len(document) for document in documents]).cumsum(0).tolist())
    hidden = model.hidden_states(ids, bounds, lora.linear_fn(model.weights))
    rows = torch.cat([torch.arange(start, end - 1) for start, end in pairwise(bounds)])
    factors = torch.cat([torch.arange(len(document) - 1) for document in documents]).cos()
    logprobs = token_logprobs(hidden[rows.to(device)], model.head_weight, ids[rows.to(device) + 1]).logprobs_T
    grads = torch.autograd.grad((logprobs * factors.to(device, logprobs.dtype)).sum(), lora.parameters())
    return {name: grad.cpu() for (name, _), grad in zip(lora.named_parameters(), grads, strict=True)}


def _errors(actual: dict, expected: dict) -> dict[str, float]:
    return {name: relative_error(actual[name], expected[name]) for name in expected}


@only_outside_interpreter
@needs_triton
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the tests below")
def test_every_gradient_in_the_interpreter(monkeypatch):
    """As on a GPU, but for torch's attention: each public function is told to take its kernels."""
    layers = ("linear_attention", "full_attention")
    config = tiny_config(**{**FIELDS, "layer_types": layers, "vocab_size": 300, "linear_value_head_dim": 16})
    weights, documents = random_tensors(config), _documents(300, (66, 3))
    exact = {name: tensor.double() for name, tensor in weights.items()}
    expected = _gradients(config, exact, documents, "cpu", torch.float64)
    chosen = []
    for package in ("delta_train", "rms_norm", "swiglu", "logprobs", "qk_norm_rope"):
        name = f"kiln_nn.kernels.{package}.may_train_on_gpu"
        monkeypatch.setattr(name, lambda *_, package=package: bool(chosen.append(package)) or True)
    errors = _errors(_gradients(config, weights, documents, "cpu"), expected)
    assert len(set(chosen)) == 5
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 3e-5, f"{worst}: {errors[worst]:.1e}"


@on_triton
@only_on_gpu
def test_float32_gradients_of_every_tensor_are_those_of_float64():
    config = tiny_config(**FIELDS)
    weights, documents = random_tensors(config), _documents(config.vocab_size)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    expected = _gradients(config, exact, documents, "cpu", torch.float64)
    errors = _errors(_gradients(config, weights, documents, "cuda"), expected)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-3, f"{worst}: {errors[worst]:.1e}"


@on_triton
@only_on_gpu
def test_bf16_gradients_are_as_near_as_those_of_the_references():
    config = tiny_config(**FIELDS)
    documents = _documents(config.vocab_size)
    rounded = {name: t.bfloat16() if t.dim() > 1 else t for name, t in random_tensors(config).items()}
    exact = {name: tensor.double() for name, tensor in rounded.items()}
    expected = _gradients(config, exact, documents, "cpu", torch.float64)
    errors = _errors(_gradients(config, rounded, documents, "cuda"), expected)
    # The same model in the same format on the CPU, where plain torch computes it; it keeps the heads of
    # DeltaNet layers in float32, which the kernels round.
    noise = _errors(_gradients(config, rounded, documents, "cpu"), expected)
    mean, mean_noise = (sum(part.values()) / len(part) for part in (errors, noise))
    assert mean < 1.5 * mean_noise, f"{mean:.3f} against {mean_noise:.3f}"
    assert max(errors.values()) < 2.5 * max(noise.values())


@on_triton
@only_on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_documents_gradients_equal_those_it_gets_alone(dtype):
    config = tiny_config(**FIELDS)
    weights = {name: t.to(dtype) if t.dim() > 1 else t for name, t in random_tensors(config).items()}
    documents = _documents(config.vocab_size)
    together = _gradients(config, weights, documents, "cuda")
    alone = [_gradients(config, weights, [document], "cuda") for document in documents]
    summed = {name: sum(part[name] for part in alone) for name in together}
    # bf16: products over more rows are summed in another order before they are rounded.
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    errors = _errors(together, summed)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"
    if dtype is torch.float32:
        run_on = _errors(_gradients(config, weights, [torch.cat(documents)], "cuda"), summed)
        assert min(run_on.values()) > 10 * tolerance
