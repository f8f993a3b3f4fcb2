"""The learning adapter's linear layers against their formula, by autograd in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.lora import AdapterCopies, adapted_linears
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import random_tensors, tiny_config

TOKENS, INPUTS, OUTPUTS, RANK, SCALE = 7, 6, (5, 4, 3), 2, 1.5


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,)])
def test_outputs_and_gradients(adapted):
    x = _draw(TOKENS, INPUTS, seed=0).requires_grad_()
    weights = [_draw(size, INPUTS, seed=size) for size in OUTPUTS]
    pairs = [
        (_draw(RANK, INPUTS, seed=10 + i).requires_grad_(), _draw(size, RANK, seed=20 + i).requires_grad_())
        if i in adapted
        else None
        for i, size in enumerate(OUTPUTS)
    ]
    leaves = [x, *(tensor for pair in pairs if pair is not None for tensor in pair)]
    out_grads = [_draw(TOKENS, size, seed=30 + size) for size in OUTPUTS]
    outputs = adapted_linears(x, weights, pairs, AdapterCopies.of(pairs, SCALE, torch.float64))
    expected = [
        x @ w.t() + (0 if pair is None else SCALE * (x @ pair[0].t()) @ pair[1].t())
        for w, pair in zip(weights, pairs, strict=True)
    ]
    grads = torch.autograd.grad(outputs, leaves, out_grads)
    expected_grads = torch.autograd.grad(expected, leaves, out_grads)
    for got, want in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def test_a_changed_parameter_is_used_at_once_and_an_unchanged_one_not_copied_again(monkeypatch):
    config = tiny_config()
    lora, weights = random_lora(config), random_tensors(config)
    path = "model.layers.0.mlp.gate_proj"
    linear = lora.linear_fn(weights)
    x = torch.ones(2, config.hidden_size)
    copied = []
    make = AdapterCopies.of.__func__
    monkeypatch.setattr(
        AdapterCopies, "of", classmethod(lambda cls, *a: (copied.append(1), make(cls, *a))[1])
    )
    with torch.no_grad():
        (before,) = linear((path,), x)
        linear((path,), x)
        assert len(copied) == 1
        dict(lora.named_parameters())[f"{path}.lora_B"].mul_(2)
        (after,) = linear((path,), x)
    base = x @ weights[f"{path}.weight"].t()
    assert torch.allclose(after - base, 2 * (before - base), rtol=1e-3, atol=1e-5)
