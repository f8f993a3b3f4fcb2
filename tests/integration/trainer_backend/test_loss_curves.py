"""Whole jobs beside a plain loop: the same data, the same order, the same curve.

The loop shares nothing with the trainer but the model's layers: one completion at a time without
packing, all logits at once, the papers' formulas token by token, torch's own AdamW.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from kiln_common.pb import trainer_pb2
from kiln_nn.lora.parameters import LoraParameters
from kiln_trainer.recipes.options import GrpoOptions
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.setup import lora_spec
from tests.support.distillation import log_probabilities
from tests.support.policy_loss_formulas import Completion, expected_loss
from tests.support.training import (
    RecordingHooks,
    ServedModel,
    grpo_request,
    rollout,
    sft_request,
    task,
)

NUM_STEPS = 6
CONFIG = {
    "epochs": NUM_STEPS,
    "learning_rate": 4e-3,
    "weight_decay": 0.02,
    "max_grad_norm": 0.5,
    "batch_tokens": 24,
}
# float32 here and there, summed in other orders; Adam's first steps magnify the difference.
TOLERANCE = {"rel": 1e-3, "abs": 1e-4}


def plain_curve(
    served: ServedModel, request: trainer_pb2.SubmitRequest, loss_of: Callable[[LoraParameters], torch.Tensor]
) -> tuple[list[float], list[float]]:
    """The losses and gradient norms of every step of a plain training loop."""
    config = request.config
    lora = LoraParameters.create(served.loaded.config, lora_spec(config.lora), seed=config.seed)
    optimizer = torch.optim.AdamW(
        lora.parameters(), lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
    )
    losses, norms = [], []
    for _ in range(NUM_STEPS):
        loss = loss_of(lora)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(lora.parameters(), config.optimizer.max_grad_norm)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def job_curve(
    served: ServedModel, request: trainer_pb2.SubmitRequest, folder: object
) -> tuple[list[float], list[float]]:
    hooks = RecordingHooks()
    TorchBackend(served.locate).run(task(request, folder), hooks)
    metrics = [report.metrics for report in hooks.reports]
    return [found["loss"] for found in metrics], [found["grad_norm"] for found in metrics]


def scores(served: ServedModel, lora: LoraParameters | None, drawn: trainer_pb2.GrpoRollout) -> torch.Tensor:
    """[completion] log-probabilities, from plain logits."""
    prompt, completion = [*drawn.prompt_token_ids], [*drawn.completion_token_ids]
    log_p = log_probabilities(served, lora, prompt + completion)
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return log_p[rows, torch.tensor(completion)]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_a_policy_job_follows_the_plain_loop(served, tmp_path, loss_type):
    rng, noise = random.Random(3), torch.Generator().manual_seed(3)
    rollouts = []
    for place in range(6):
        drawn = rollout([7, 8, 9], [rng.randrange(300) for _ in range(2 + place)], float(place % 3))
        with torch.no_grad():  # as an engine would have drawn it, nearly
            known = scores(served, None, drawn) + 0.3 * torch.randn(2 + place, generator=noise)
        drawn.behaviour_logprobs.extend(known.clamp(max=0).tolist())
        rollouts.append(drawn)
    wire = {"type": loss_type, "kl_coef": 0.05, "importance_mode": "token", "importance_cap": 1.2}
    request = grpo_request([rollouts[:3], rollouts[3:]], wire, **CONFIG)
    spelled_out = GrpoOptions.from_proto(request.grpo.loss).to_proto()
    loss = {field.name: getattr(spelled_out, field.name) for field in spelled_out.DESCRIPTOR.fields}
    old: list[list[float]] = []

    def loss_of(lora: LoraParameters) -> torch.Tensor:
        now = [scores(served, lora, drawn).double() for drawn in rollouts]
        if not old:
            old.extend(score.tolist() for score in now)
        with torch.no_grad():
            reference = [scores(served, None, drawn).tolist() for drawn in rollouts]
        completions = [
            Completion(drawn.reward, [*drawn.behaviour_logprobs], before, base, [*score])
            for drawn, score, before, base in zip(rollouts, now, old, reference, strict=True)
        ]
        return expected_loss([completions[:3], completions[3:]], loss)[0]

    expected = plain_curve(served, request, loss_of)
    found = job_curve(served, request, tmp_path)
    assert found[0] == pytest.approx(expected[0], **TOLERANCE)
    assert found[1] == pytest.approx(expected[1], **TOLERANCE)
    assert max(found[0]) - min(found[0]) > 0.02


def test_a_supervised_job_follows_the_plain_loop(served, tmp_path):
    examples = [[5, 201, 17, 88, 240, 3], [9, 8, 7, 6], [33, 2, 150, 12, 77, 1, 4, 90]]
    request = sft_request(examples, num_prompt=2, **CONFIG)

    def loss_of(lora: LoraParameters) -> torch.Tensor:
        surprises = []
        for token_ids in examples:
            log_p = log_probabilities(served, lora, token_ids)
            surprises += [-log_p[place - 1, token_ids[place]] for place in range(2, len(token_ids))]
        return torch.stack(surprises).mean()

    expected = plain_curve(served, request, loss_of)
    found = job_curve(served, request, tmp_path)
    assert found[0] == pytest.approx(expected[0], **TOLERANCE)
    assert found[1] == pytest.approx(expected[1], **TOLERANCE)
    assert found[0][-1] < found[0][0] - 0.1
