"""Gradients of every LoRA tensor: against PEFT, against float64, packed against alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kiln_nn.packed_model as packed_model_module
from kiln_nn.kernels.gated_delta import gated_delta_recurrent
from kiln_nn.kernels.logprobs import token_logprobs
from kiln_nn.kernels.varlen_attention import ATTENTION_OPERATORS
from kiln_nn.lora import adapter_table
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from tests.support.delta_inputs import relative_error
from tests.support.lora_builders import peft_model_with, random_lora
from tests.support.tiny_models import (
    SHAPES,
    hf_model,
    make_checkpoint,
    random_tensors,
    read_tensors,
    tiny_config,
)

TOLERANCE = 1e-4
LENGTHS = (70, 2, 33)


def _documents(vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(21)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in LENGTHS]


def _weighted_loss(logprobs_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """A loss with signs, as advantages have; the last token of a document predicts nothing."""
    return -(logprobs_T * torch.cos(positions_T.to(logprobs_T.dtype))).sum()


def _loss(model: PackedModel, lora: LoraParameters, documents: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.cat(documents)
    lengths = [len(document) for document in documents]
    cu_seqlens = (0, *torch.tensor(lengths).cumsum(0).tolist())
    hidden = model.hidden_states(ids, cu_seqlens, lora.linear_fn(model.weights))
    positions = torch.cat([torch.arange(length) for length in lengths])
    has_next = torch.ones(len(ids), dtype=torch.bool)
    has_next[torch.tensor(cu_seqlens[1:]) - 1] = False
    logprobs = token_logprobs(hidden, model.head_weight, ids.roll(-1)).logprobs_T
    return _weighted_loss(logprobs[has_next], positions[has_next])


def _gradients(model: PackedModel, lora: LoraParameters, documents: list[torch.Tensor]) -> dict:
    grads = torch.autograd.grad(_loss(model, lora, documents), lora.parameters())
    return dict(zip([name for name, _ in lora.named_parameters()], grads, strict=True))


def _assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_lora_gradient_equals_pefts(tmp_path, shape):
    config = make_checkpoint(tmp_path, **SHAPES[shape])
    lora = random_lora(config)
    documents = _documents(config.vocab_size)
    oracle = peft_model_with(lora, hf_model(tmp_path))
    for document in documents:
        logits = oracle(input_ids=document[None]).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, document[1:, None])[:, 0]
        _weighted_loss(logprobs, torch.arange(len(document) - 1)).backward()
    prefix, suffix = "base_model.model.", ".default.weight"
    expected = {
        name.removeprefix(prefix).removesuffix(suffix): parameter.grad
        for name, parameter in oracle.named_parameters()
        if parameter.requires_grad
    }
    actual = _gradients(PackedModel(config, read_tensors(tmp_path)), lora, documents)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    _assert_close(actual, expected, TOLERANCE)


def test_a_packed_documents_gradients_equal_those_it_gets_alone():
    config = tiny_config()
    model, lora = PackedModel(config, random_tensors(config)), random_lora(config)
    documents = _documents(config.vocab_size)
    alone = [_gradients(model, lora, [document]) for document in documents]
    together = _gradients(model, lora, documents)
    _assert_close(together, {name: sum(part[name] for part in alone) for name in together}, 1e-5)
    swapped = _gradients(model, lora, [documents[2], documents[0]])
    _assert_close(swapped, {name: alone[0][name] + alone[2][name] for name in swapped}, 1e-5)


def test_the_comparison_sees_gradients_that_leak_between_documents():
    config = tiny_config()
    model, lora = PackedModel(config, random_tensors(config)), random_lora(config)
    documents = _documents(config.vocab_size)
    together = _gradients(model, lora, documents)
    run_on = _gradients(model, lora, [torch.cat(documents)])
    assert all(relative_error(run_on[name], together[name]) > 1e-3 for name in together)


def test_every_lora_gradient_equals_float64_through_the_plain_recurrence(monkeypatch):
    config = tiny_config(layer_types=("linear_attention", "linear_attention", "full_attention"))
    weights, documents = random_tensors(config), _documents(config.vocab_size)
    actual = _gradients(PackedModel(config, weights), random_lora(config), documents)

    def recurrent(*arguments):
        return gated_delta_recurrent(*arguments)[0]

    monkeypatch.setattr(packed_model_module, "delta_train", recurrent)
    exact_weights = {name: tensor.double() for name, tensor in weights.items()}
    exact_lora = random_lora(config, dtype=torch.float64)
    expected = _gradients(PackedModel(config, exact_weights), exact_lora, documents)
    assert all(gradient.dtype == torch.float64 for gradient in expected.values())
    _assert_close(actual, expected, TOLERANCE)


def test_computing_layers_again_changes_nothing():
    config = tiny_config()
    weights, lora, documents = random_tensors(config), random_lora(config), _documents(config.vocab_size)
    kept = _gradients(PackedModel(config, weights), lora, documents)
    for num_kept_layers in (0, 2):
        recomputed = _gradients(PackedModel(config, weights, num_kept_layers), lora, documents)
        assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def _num_calls(operators, num_kept_layers: int | None) -> int:
    config = tiny_config()
    weights, lora, documents = random_tensors(config), random_lora(config), _documents(config.vocab_size)
    with CountingOperators(operators) as counted:
        _gradients(PackedModel(config, weights, num_kept_layers), lora, documents)
    return counted.num_calls


def test_attention_is_not_computed_again_where_its_layer_is():
    assert _num_calls(ATTENTION_OPERATORS, 0) == _num_calls(ATTENTION_OPERATORS, None) > 0


def test_a_layer_is_computed_again_up_to_its_last_product():
    products = (torch.ops.aten.addmm_.default,)  # of an adapted linear layer with its base
    num_layers, num_linears = tiny_config().num_layers, len(adapter_table(tiny_config()))
    extra = _num_calls(products, 0) - _num_calls(products, None)
    assert extra == num_linears - num_layers


class CountingOperators(TorchDispatchMode):
    def __init__(self, operators) -> None:
        super().__init__()
        self._operators, self.num_calls = operators, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.num_calls += operator in self._operators
        return operator(*args, **(kwargs or {}))
