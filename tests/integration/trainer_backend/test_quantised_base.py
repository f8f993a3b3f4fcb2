"""Training on an engine's quantised weights: what an adapter learns there, and that they stay as they are."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.blocks import Weights
from kiln_nn.kernels.quantised import QuantisedMatrix
from kiln_nn.lora import read_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.torch_backend.activation_memory import ActivationPlan
from kiln_trainer.torch_backend.backend import TorchBackend
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import WHOLE_GROUPS
from tests.support.training import (
    RecordingHooks,
    grpo_request,
    peft_folder,
    rollout,
    served_model,
    sft_request,
    task,
)
from tests.support.variants import SETTING

TOKENS = torch.randint(0, 300, (96,), generator=torch.Generator().manual_seed(3))
BOUNDS = (0, 40, 96)
PROMPT = [7, 8, 9]
EXAMPLES = [[(5 * i + j) % 300 for j in range(12)] for i in range(8)]


@pytest.fixture(scope="module", params=["fp8", "int4"])
def quantised(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    loading = {"quantization": request.param}
    with served_model(folder, loading=loading, dtype=torch.bfloat16, **WHOLE_GROUPS) as served:
        yield served


def dequantised(weights: Weights, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The same weights as tensors of `dtype`."""
    return {
        name: weight.dequantise(dtype) if isinstance(weight, QuantisedMatrix) else weight.to(dtype)
        for name, weight in weights.items()
    }


def gradients(
    model: PackedModel, lora: LoraParameters, num_kept_layers: int | None = None
) -> dict[str, torch.Tensor]:
    model.num_kept_layers = num_kept_layers
    hidden = model.hidden_states(TOKENS, BOUNDS, lora.linear_fn(model.weights))
    loss = (model.logits(hidden).float().log_softmax(-1)[:, 7] * torch.cos(torch.arange(96.0))).sum()
    grads = torch.autograd.grad(loss, lora.parameters())
    return dict(zip([name for name, _ in lora.named_parameters()], grads, strict=True))


def worst_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of any tensor, relative to its length."""
    return max(float((actual[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("targets", ["all", ("in_proj_z", "up_proj", "o_proj")], ids=["all", "some"])
@pytest.mark.parametrize("num_kept_layers", [None, 1], ids=["kept", "computed again"])
def test_gradients_are_those_of_the_dequantised_weights(quantised, targets, num_kept_layers):
    config, weights = quantised.loaded.config, quantised.loaded.arena.views()
    lora = random_lora(config, targets=targets)
    actual = gradients(PackedModel(config, weights), lora, num_kept_layers)
    expected = gradients(PackedModel(config, dequantised(weights)), lora)
    # The same products of the same numbers.
    assert worst_error(actual, expected) < 1e-5


def test_gradients_in_bfloat16_differ_by_no_more_than_its_noise(quantised):
    config, weights = quantised.loaded.config, quantised.loaded.arena.views()
    lora = random_lora(config)
    exact = gradients(PackedModel(config, dequantised(weights)), lora)
    plain = {name: w.bfloat16() if isinstance(w, torch.Tensor) else w for name, w in weights.items()}
    actual = gradients(PackedModel(config, plain), lora)
    noise = worst_error(gradients(PackedModel(config, dequantised(weights, torch.bfloat16)), lora), exact)
    assert worst_error(actual, exact) < 1.2 * noise


def test_nothing_of_a_weights_size_is_kept_for_the_backward_pass(quantised):
    config, weights = quantised.loaded.config, quantised.loaded.arena.views()
    lora = random_lora(config, targets=("q_proj", "gate_proj"))
    plans = [
        ActivationPlan.measure(model, lora.linear_fn(model.weights), torch.device("cpu"))
        for model in (PackedModel(config, weights), PackedModel(config, dequantised(weights)))
    ]
    # Dequantised weights would add a quarter; addresses that are used again make the measure a little rough.
    assert plans[0].kept_bytes == pytest.approx(plans[1].kept_bytes, rel=0.05)


def test_a_job_learns_on_quantised_weights_and_leaves_them_as_they_are(quantised, tmp_path):
    checksum, hooks = quantised.loaded.arena.checksum(), RecordingHooks()
    backend = TorchBackend(quantised.locate)
    backend.run(task(sft_request([EXAMPLES[0]], epochs=12, learning_rate=2e-3), tmp_path), hooks)
    assert backend.mapped_model.num_allocated_base_bytes == 0
    assert quantised.loaded.arena.checksum() == checksum
    losses = [report.metrics["loss"] for report in hooks.reports]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
@pytest.mark.parametrize("kind", ["sft", "grpo", "k1", "k2", "k3"])
def test_a_job_learns_what_it_would_on_whole_weights_of_the_same_numbers(tmp_path, monkeypatch, scheme, kind):
    monkeypatch.setenv(SETTING, scheme)  # draws the checkpoint on the scheme's numbers
    rewarded = [rollout(PROMPT, [token], float(token % 2 == 0)) for token in range(16)]
    options = {"epochs": 3, "learning_rate": 5e-3, "batch_tokens": 64}
    # Held back to the base model, which is the quantised one without the adapter.
    penalty = {} if kind == "grpo" else {"kl_coef": 0.5, "kl_estimator": kind}
    request = (
        sft_request(EXAMPLES, **options) if kind == "sft" else grpo_request([rewarded], penalty, **options)
    )
    learned = []
    for quantization in ("none", scheme):
        folder = tmp_path / quantization
        with served_model(folder, loading={"quantization": quantization}) as served:
            result = TorchBackend(served.locate).run(task(request, folder / "job"), RecordingHooks())
            pairs = read_adapter(peft_folder(result, folder / "result"), served.loaded.config).tensors
        learned.append({f"{path}.{i}": part for path, pair in pairs.items() for i, part in enumerate(pair)})
    whole, rounded = learned
    assert all(part.norm() > 0 for part in whole.values())
    # Sums in another order, over a few steps of an optimiser that divides by small numbers.
    assert worst_error(rounded, whole) < 1e-3
