"""The packed model on a GPU: the same numbers as on the CPU, and bf16 weights that work."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.gated_delta import gated_delta_chunked, gated_delta_recurrent
from kiln_nn.kernels.logprobs import token_logprobs
from kiln_nn.packed_model import PackedModel
from tests.support.delta_inputs import random_delta_inputs, relative_error
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import SHAPES, random_tensors, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CU_SEQLENS = (0, 150, 152, 185)


def _logprobs_and_gradients(config, weights: dict, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    lora = random_lora(config)
    on_device = {path: (a.to(device), b.to(device)) for path, (a, b) in lora.tensors().items()}
    lora = type(lora)(lora.spec, on_device)
    model = PackedModel(config, {name: t.to(device) for name, t in weights.items()}, num_kept_layers=0)
    ids = (torch.arange(CU_SEQLENS[-1]) * 7 % config.vocab_size).to(device)
    hidden = model.hidden_states(ids, CU_SEQLENS, lora.linear_fn(model.weights))
    logprobs = token_logprobs(hidden, model.head_weight, ids.roll(-1)).logprobs_T
    weights_T = torch.arange(len(ids), device=device).cos()
    grads = torch.autograd.grad((logprobs * weights_T).sum(), lora.parameters())
    return logprobs.detach().cpu(), [gradient.cpu() for gradient in grads]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_the_cpu(shape):
    config = tiny_config(**SHAPES[shape])
    weights = random_tensors(config)
    logprobs, grads = _logprobs_and_gradients(config, weights, "cuda")
    expected, expected_grads = _logprobs_and_gradients(config, weights, "cpu")
    assert relative_error(logprobs, expected) < 1e-5
    assert max(map(relative_error, grads, expected_grads)) < 1e-4


def test_bf16_weights_train_close_to_float32():
    config = tiny_config()
    weights = random_tensors(config)
    rounded = {name: t.bfloat16() if t.dim() > 1 else t for name, t in weights.items()}
    exact = {name: t.float() for name, t in rounded.items()}
    logprobs, grads = _logprobs_and_gradients(config, rounded, "cuda")
    expected, expected_grads = _logprobs_and_gradients(config, exact, "cuda")
    assert logprobs.dtype == torch.float32
    # bf16 keeps 8 bits: a few roundings of activations per layer, four layers
    assert relative_error(logprobs, expected) < 0.03
    # and twice that many in the backward pass; bf16 on the CPU gives 0.12 here, unrelated gradients 1.4
    assert sum(map(relative_error, grads, expected_grads)) / len(grads) < 0.2


@pytest.mark.parametrize("repeated_keys", [False, True])
def test_the_chunked_rule_at_the_released_head_width(repeated_keys):
    inputs = random_delta_inputs(
        300,
        num_key_heads=2,
        num_value_heads=4,
        key_dim=128,
        value_dim=128,
        repeated_keys=repeated_keys,
    )
    arguments = [x.cuda() for x in inputs.tensors()]
    leaves = [x.clone().requires_grad_() for x in arguments]
    expected, _ = gated_delta_recurrent(*leaves, (0, 200, 300))
    expected_grads = torch.autograd.grad(expected.cos().sum(), leaves)
    leaves = [x.float().requires_grad_() for x in arguments]
    out = gated_delta_chunked(*leaves, (0, 200, 300)).out_THV
    grads = torch.autograd.grad(out.cos().sum(), leaves)
    assert relative_error(out, expected) < 2e-5
    assert max(map(relative_error, grads, expected_grads)) < 1e-4
