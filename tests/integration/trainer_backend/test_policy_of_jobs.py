"""Which policies a job's loss compares: the sampler, the start, the adapter-free reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_common.pb import trainer_pb2
from kiln_nn.lora import read_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.packing import pack
from kiln_trainer.domain.training import StartingPoint
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.checkpoints import CheckpointFolder
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.setup import job_hash
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from tests.support.training import (
    RecordingHooks,
    ServedModel,
    grpo_request,
    grpo_spec,
    peft_folder,
    rollout,
    sft_request,
    starting_point,
    task,
)

RNG = random.Random(3)
PROMPT = [7, 8, 9]
TEMPERATURE = 0.7


def random_ids(count: int) -> list[int]:
    return [RNG.randrange(300) for _ in range(count)]


def start_of(served: ServedModel, folder: Path, learning_rate: float) -> StartingPoint:
    examples = [[*PROMPT, *random_ids(4)] for _ in range(3)]
    request = sft_request(examples, num_prompt=3, epochs=4, learning_rate=learning_rate)
    result = TorchBackend(served.locate).run(task(request, folder), RecordingHooks())
    return starting_point("start@1", peft_folder(result, folder))


@pytest.fixture(scope="module")
def start(served, tmp_path_factory) -> StartingPoint:
    """An adapter that has learned something, as another job left it."""
    return start_of(served, tmp_path_factory.mktemp("start"), 2e-3)


@pytest.fixture(scope="module")
def near_start(served, tmp_path_factory) -> StartingPoint:
    """One that has learned less: a few draws of it still tell how far it is from the base."""
    return start_of(served, tmp_path_factory.mktemp("near_start"), 5e-4)


def logprobs(
    served: ServedModel, lora: LoraParameters | None, prompt: list[int], completion: list[int]
) -> Any:
    """[completion] at TEMPERATURE, from plain logits."""
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    linear = lora.linear_fn(model.weights) if lora is not None else None
    ids = torch.tensor(prompt + completion)
    logits = model.logits(model.hidden_states(ids, [0, len(ids)], linear)) / TEMPERATURE
    rows = torch.arange(len(prompt) - 1, len(ids) - 1)
    return logits.log_softmax(-1)[rows, ids[len(prompt) :]]


def adapter_of(served: ServedModel, folder: Path) -> LoraParameters:
    read = read_adapter(folder, served.loaded.config)
    return LoraParameters.from_tensors(
        served.loaded.config, read.spec, read.tensors, device=torch.device("cpu")
    )


def rollouts_of_the_base(served: ServedModel, count: int = 4) -> list[trainer_pb2.GrpoRollout]:
    """Completions that the bare base model drew, rewarded by their number."""
    found = []
    for number in range(count):
        completion = random_ids(3 + number)
        with torch.no_grad():
            known = logprobs(served, None, PROMPT, completion).tolist()
        found.append(
            rollout(PROMPT, completion, float(number), behaviour_logprobs=known, temperature=TEMPERATURE)
        )
    return found


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_rollouts_of_another_version_are_weighed_by_how_likely_the_start_draws_them(served, start, mode):
    """REINFORCE with a truncated weight, autograd from plain logits at the rollouts' temperature."""
    rollouts = rollouts_of_the_base(served)
    cap = 1.5
    job = prepare_grpo(grpo_spec([rollouts], importance_mode=mode, importance_cap=cap))
    lora = adapter_of(served, start.safetensors_path.parent)
    objective = torch.zeros(())
    weights = []
    for document, drawn in zip(job.documents, rollouts, strict=True):
        log_p = logprobs(served, lora, PROMPT, [*drawn.completion_token_ids])
        log_ratio = log_p.detach() - torch.tensor([*drawn.behaviour_logprobs])
        if mode == "sequence":
            log_ratio = log_ratio.sum().expand_as(log_ratio)
        weight = log_ratio.exp().clamp(max=cap)
        weights += weight.tolist()
        objective = objective - (weight * document.advantage_s[0] * log_p).mean() / len(rollouts)
    objective.backward()
    expected = {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}
    assert max(weights) == cap
    assert min(weights) < 0.9

    for parameter in lora.parameters():
        parameter.grad = None
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    policy = Policy(model, lora, torch.device("cpu"))
    forward_backward(policy, pack(job.documents), job.objective, 4.0, StepSums(), is_first_step=True)
    for name, parameter in lora.named_parameters():
        error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_the_reference_is_the_base_without_any_adapter(served, start, tmp_path):
    """A job that goes on from an adapter is pulled back to the base model, not to that adapter."""
    rollouts = rollouts_of_the_base(served)
    hooks = RecordingHooks()
    request = grpo_request([rollouts], {"kl_coef": 1.0}, learning_rate=1e-9)
    TorchBackend(served.locate).run(task(request, tmp_path, start), hooks)
    lora = adapter_of(served, start.safetensors_path.parent)
    estimates = []
    with torch.no_grad():
        for drawn in rollouts:
            completion = [*drawn.completion_token_ids]
            distance = logprobs(served, None, PROMPT, completion) - logprobs(served, lora, PROMPT, completion)
            estimates += (distance.exp() - 1 - distance).tolist()
    assert hooks.reports[0].metrics["kl"] == pytest.approx(sum(estimates) / len(estimates), rel=1e-4)
    assert hooks.reports[0].metrics["kl"] > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_brings_a_policy_back_to_the_base(served, near_start, tmp_path, estimator):
    """Rewards that all but cancel, and a strong pull: the divergence falls."""
    tokens = torch.multinomial(
        logprobs_of_next(served, adapter_of(served, near_start.safetensors_path.parent)).exp(),
        64,
        replacement=True,
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    # Each token is drawn often or seldom, and rewarded whether or not it is: every other one.
    drawn = [
        rollout(PROMPT, [token], float(place % 2), temperature=TEMPERATURE)
        for place, token in enumerate(sorted(tokens))
    ]
    request = grpo_request(
        [drawn],
        {"kl_coef": 20.0, "kl_estimator": estimator, "scale_rewards": "none"},
        epochs=6,
        learning_rate=5e-4,
        batch_tokens=1024,
    )
    result = TorchBackend(served.locate).run(task(request, tmp_path, near_start), RecordingHooks())
    before = divergence(served, near_start.safetensors_path.parent)
    assert before > 0.05
    assert divergence(served, peft_folder(result, tmp_path / "result")) < 0.5 * before


def logprobs_of_next(served: ServedModel, lora: LoraParameters | None) -> torch.Tensor:
    """[vocabulary] after PROMPT at TEMPERATURE."""
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    linear = lora.linear_fn(model.weights) if lora is not None else None
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor(PROMPT), [0, len(PROMPT)], linear)
        return (model.logits(hidden[-1:])[0] / TEMPERATURE).log_softmax(-1)


def divergence(served: ServedModel, adapter: Path) -> float:
    """KL(adapter || base) of the token after PROMPT."""
    log_p = logprobs_of_next(served, adapter_of(served, adapter))
    return float((log_p.exp() * (log_p - logprobs_of_next(served, None))).sum())


def test_the_old_policy_is_the_start_for_every_document_of_every_epoch(served, start, tmp_path):
    """Whether a document's first pass came before the first update or after it."""
    rollouts = rollouts_of_the_base(served)
    request = grpo_request([rollouts], epochs=3, batch_tokens=10, gradient_accumulation=1)
    hooks = RecordingHooks()
    job = task(request, tmp_path, start)
    TorchBackend(served.locate).run(job, hooks)
    assert hooks.reports[-1].num_steps >= 6
    saved = CheckpointFolder(tmp_path).newest(job_hash(job, served.loaded.manifest.model_hash))
    lora = adapter_of(served, start.safetensors_path.parent)
    with torch.no_grad():
        expected = [logprobs(served, lora, PROMPT, [*drawn.completion_token_ids]) for drawn in rollouts]
    torch.testing.assert_close(
        saved.tensors["stream/old_logprobs"], torch.cat(expected), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["sft", "grpo", "dr_grpo"])
def test_a_step_is_the_same_however_its_epoch_is_cut_into_micro_batches(served, tmp_path, kind):
    if kind == "sft":
        requests = [
            sft_request([random_ids(length) for length in (4, 9, 17)], batch_tokens=size)
            for size in (256, 17)
        ]
        for request in requests:
            request.sft.CopyFrom(requests[0].sft)
    else:
        rollouts = rollouts_of_the_base(served)
        requests = [grpo_request([rollouts], {"type": kind}, batch_tokens=size) for size in (256, 10)]
    reports = []
    for request in requests:
        hooks = RecordingHooks()
        TorchBackend(served.locate).run(task(request, tmp_path / str(request.config.batch_tokens)), hooks)
        (report,) = hooks.reports
        reports.append(report.metrics)
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-4, abs=1e-6)
    assert reports[0]["grad_norm"] == pytest.approx(reports[1]["grad_norm"], rel=1e-4)
