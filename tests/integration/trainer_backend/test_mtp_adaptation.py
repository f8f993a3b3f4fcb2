"""The multi-token-prediction layer learns beside the adapter, follows it, and leaves it as it would have been."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kiln_nn.lora import parse_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.packing import pack
from kiln_trainer.domain.errors import ModelWithoutMtp, WeightsLost
from kiln_trainer.domain.training import TrainedAdapter
from kiln_trainer.recipes.sft import prepare_sft
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from tests.integration.trainer_backend.test_backend_resume import GROUPS, random_ids
from tests.support.distillation import PROMPTS, ModelSampler, opd_request
from tests.support.lora_builders import random_lora
from tests.support.training import (
    RecordingHooks,
    ServedModel,
    grpo_request,
    peft_folder,
    served_model,
    sft_request,
    starting_point,
    task,
)

# Clipped, so that a norm over both would show; several micro-batches to a step, and documents whose first
# scored token no draft could have foreseen.
SETTINGS: dict[str, Any] = {
    "batch_tokens": 40, "max_grad_norm": 0.1, "weight_decay": 0.1, "checkpoint_every": 1, "epochs": 2,
}  # fmt: skip
EXAMPLES = [random_ids(n) for n in (4, 20, 9, 15, 30, 2)]
REQUESTS = {
    "sft": sft_request(EXAMPLES, **SETTINGS),
    "dropout": sft_request(EXAMPLES, **SETTINGS, dropout=0.3, type="muon"),
    "grpo": grpo_request(GROUPS, {"kl_coef": 0.1, "kl_estimator": "k3"}, **SETTINGS),
    "opd": opd_request(PROMPTS, teacher="base", settings={"samples_per_prompt": 2}, **SETTINGS),
}


def run(served: ServedModel, folder, request, trains_mtp: bool, hooks=None, start=None) -> TrainedAdapter:
    request = type(request).FromString(request.SerializeToString())
    request.config.train_mtp = trains_mtp
    if request.WhichOneof("recipe") == "opd":
        start = start or starting_point("learned@1", learned(served, folder / "learned"))
    sampler = ModelSampler(served, start=start.safetensors_path.parent if start else None)
    job = task(request, folder, start, sampler=sampler)
    return TorchBackend(served.locate).run(job, hooks or RecordingHooks())


def learned(served: ServedModel, folder):
    """An adapter that is there to be gone on from."""
    request = sft_request(EXAMPLES[:3], epochs=2, checkpoint_every=100)
    return peft_folder(
        TorchBackend(served.locate).run(task(request, folder), RecordingHooks()), folder / "out"
    )


def matrices(served: ServedModel, result: TrainedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return parse_adapter(
        result.content.config_json, bytes(result.content.view()), served.loaded.config
    ).tensors


@pytest.mark.parametrize("recipe", REQUESTS)
def test_the_main_adapter_is_the_same_to_the_bit(served, tmp_path, recipe):
    reports = [RecordingHooks(), RecordingHooks()]
    plain, both = (
        matrices(served, run(served, tmp_path / str(on), REQUESTS[recipe], on, hooks))
        for on, hooks in zip((False, True), reports, strict=True)
    )
    for path, pair in plain.items():
        assert all(map(torch.equal, pair, both[path])), path
    moved = {path for path in both.keys() - plain.keys() if bool(both[path][1].any())}
    assert moved == both.keys() - plain.keys() != set()
    for without, beside in zip(reports[0].reports, reports[1].reports, strict=True):
        metrics = dict(beside.metrics)
        assert 0 < metrics.pop("mtp_acceptance") < 1
        assert metrics.pop("mtp_kl") > 0
        assert metrics == dict(without.metrics)


def test_its_gradient_is_that_of_the_divergence_from_the_models_own_distribution(served):
    """Autograd through plain logits, one document after the other; however the step is cut."""
    lora = random_lora(served.loaded.config, seed=5, with_mtp=True)
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    linear = lora.linear_fn(model.weights)
    documents = prepare_sft(sft_request(EXAMPLES).sft).documents
    total, overlap, num_drafted = torch.zeros(()), 0.0, 0
    for ids in EXAMPLES:
        if len(ids) < 3:
            continue
        tokens = torch.tensor(ids)
        hidden = model.forward(tokens, (0, len(ids)), linear)
        drafts_TD = model.mtp_hidden_states(hidden, tokens, (0, len(ids)), linear=linear)
        # Position t guesses token t + 2; what the model itself says of that token is at t + 1.
        log_q = model.logits(hidden.after_norm_TD).log_softmax(-1).detach()[1:-1]
        log_p = model.logits(drafts_TD).log_softmax(-1)[:-2]
        total = total + (log_q.exp() * (log_q - log_p)).sum()
        overlap += float(torch.minimum(log_p, log_q).exp().sum())
        num_drafted += len(ids) - 2
    names = [name for name, _ in lora.named_parameters() if name.startswith("mtp.")]
    assert len(names) == 16
    of_mtp = lora.parameters_of_mtp()
    expected = dict(zip(names, torch.autograd.grad(total / num_drafted, of_mtp), strict=True))

    assert sum(document.num_drafted for document in documents) == num_drafted
    policy, sums = Policy(model, lora, torch.device("cpu")), StepSums()
    for cut in (documents[:2], documents[2:5], documents[5:]):  # the last one has nothing to foresee
        forward_backward(policy, pack(cut), None, 1.0, sums, is_first_step=True, num_drafted=num_drafted)
    metrics = sums.metrics()
    assert metrics["mtp_kl"] == pytest.approx(total.item() / num_drafted, rel=1e-4)
    assert metrics["mtp_acceptance"] == pytest.approx(overlap / num_drafted, rel=1e-4)
    found = dict(lora.named_parameters())
    for name, gradient in expected.items():
        error = (found[name].grad - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_drafts_come_closer_to_what_the_model_says(served, tmp_path):
    request = sft_request(
        EXAMPLES, epochs=30, learning_rate=5e-3, rank=8, batch_tokens=256, checkpoint_every=100
    )
    hooks = RecordingHooks()
    run(served, tmp_path, request, True, hooks)
    kls = [report.metrics["mtp_kl"] for report in hooks.reports]
    accepted = [report.metrics["mtp_acceptance"] for report in hooks.reports]
    assert kls[-1] < 0.85 * kls[0]
    assert accepted[-1] > accepted[0]


def test_an_interrupted_job_ends_with_the_same_bytes(served, tmp_path):
    whole = run(served, tmp_path / "whole", REQUESTS["dropout"], True)
    with pytest.raises(WeightsLost):
        run(served, tmp_path / "cut", REQUESTS["dropout"], True, RecordingHooks(1, WeightsLost("gone")))
    again = run(served, tmp_path / "cut", REQUESTS["dropout"], True)
    assert bytes(again.content.view()) == bytes(whole.content.view())


def test_a_version_goes_on_with_the_layer_or_keeps_it_as_it_is(served, tmp_path):
    first = run(served, tmp_path / "first", REQUESTS["sft"], True)
    start = starting_point("first@1", peft_folder(first, tmp_path / "start"))
    kept = matrices(served, run(served, tmp_path / "kept", REQUESTS["sft"], False, start=start))
    went_on = matrices(served, run(served, tmp_path / "on", REQUESTS["sft"], True, start=start))
    before = matrices(served, first)
    assert before.keys() == kept.keys() == went_on.keys()
    for path, pair in before.items():
        is_mtp = path.startswith("mtp.")
        assert all(map(torch.equal, pair, kept[path])) is is_mtp, path
        assert not torch.equal(pair[1], went_on[path][1]), path
        if not is_mtp:
            assert all(map(torch.equal, kept[path], went_on[path])), path


def test_a_version_without_the_layer_takes_it_up(served, tmp_path):
    start = starting_point("plain@1", learned(served, tmp_path / "plain"))
    found = matrices(served, run(served, tmp_path / "job", REQUESTS["sft"], True, start=start))
    assert any(path.startswith("mtp.") for path in found)
    lora = LoraParameters.from_tensors(
        served.loaded.config,
        random_lora(served.loaded.config, rank=4, with_mtp=True).spec,
        found,
    )
    assert len(lora.parameters_of_mtp()) == 16


def test_a_model_without_the_layer_is_told_so(tmp_path):
    with served_model(tmp_path, num_mtp_layers=0) as served, pytest.raises(ModelWithoutMtp):
        run(served, tmp_path / "job", REQUESTS["sft"], True)
