"""The step's gradient does not depend on how it is cut, and reaches every tensor."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from kiln_nn.lora import LoraSpec
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.documents import Document, PreparedJob
from kiln_trainer.data.packing import pack
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.recipes.sft import prepare_sft
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from tests.support.training import ServedModel, grpo_spec, rollout, sft_request

RNG = random.Random(11)
# Relative to the tensor's largest gradient: float32 sums in another order, of shares with opposite
# signs that mostly cancel.
TOLERANCE = 1e-4


def random_ids(count: int) -> list[int]:
    return [RNG.randrange(300) for _ in range(count)]


SFT_JOB = prepare_sft(sft_request([random_ids(length) for length in (5, 17, 9, 30)], num_prompt=2).sft)
GRPO_JOB = prepare_grpo(
    grpo_spec(
        [
            [
                rollout(
                    random_ids(4),
                    random_ids(3 + i),
                    float(i),
                    temperature=0.7,
                    behaviour_logprobs=[-4] * (3 + i),
                )
                for i in range(4)
            ]
        ],
        kl_coef=0.2,
        importance_cap=1.5,
    )
)


def adapter_in_use(served: ServedModel) -> LoraParameters:
    """An adapter whose B is not zero, as after some training."""
    lora = LoraParameters.create(served.loaded.config, LoraSpec(4, 8.0), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.05, generator=generator)
    return lora


def step_gradients(
    served: ServedModel, job: PreparedJob, cut: Sequence[Sequence[int]]
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and loss of one step whose micro-batches hold those documents."""
    lora = adapter_in_use(served)
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    policy = Policy(model, lora, torch.device("cpu"))
    normaliser = sum(job.documents[index].normaliser for indices in cut for index in indices)
    sums = StepSums()
    for indices in cut:
        documents = [job.documents[index] for index in indices]
        reference = [scored for _, scored in reference_logprobs(policy, documents)]
        batch = pack(documents, reference_logprobs=reference)
        forward_backward(policy, batch, job.objective, normaliser, sums, is_first_step=True)
    grads = {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}
    return grads, sums.metrics()["loss"]


def reference_logprobs(policy: Policy, documents: Sequence[Document]) -> list[tuple[int, torch.Tensor]]:
    every = range(len(documents))
    return sorted(policy.logprobs_of(documents, every, batch_tokens=100, with_adapter=False))


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, grad in left.items():
        error = (grad - right[name]).abs().max() / grad.abs().max()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("job", [SFT_JOB, GRPO_JOB], ids=["sft", "grpo"])
def test_packed_gradients_are_the_sum_of_each_documents_alone(served, job):
    packed, packed_loss = step_gradients(served, job, [[0, 1, 2, 3]])
    alone, alone_loss = step_gradients(served, job, [[0], [1], [2], [3]])
    assert_same(packed, alone)
    assert packed_loss == pytest.approx(alone_loss, rel=TOLERANCE)
    # The comparison would notice a document that saw its neighbour.
    joined = [[0, 1], [3, 2]]
    assert_same(packed, step_gradients(served, job, joined)[0])
    with pytest.raises(AssertionError):
        assert_same(packed, step_gradients(served, job, [[0, 1, 2]])[0])


@pytest.mark.parametrize("job", [SFT_JOB, GRPO_JOB], ids=["sft", "grpo"])
def test_every_tensor_of_both_layer_kinds_gets_a_gradient(served, job):
    grads, _ = step_gradients(served, job, [[0, 1, 2, 3]])
    kinds = {name.split(".", 3)[3] for name in grads}
    assert {"linear_attn.in_proj_a.lora_A", "self_attn.q_proj.lora_B", "mlp.down_proj.lora_A"} <= kinds
    assert len(kinds) == 2 * (5 + 4 + 3)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        assert grad.isfinite().all(), name


def test_sft_loss_is_the_weighted_mean_of_the_cross_entropy(served):
    """Against logits from the plain model, one document at a time."""
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    linear = adapter_in_use(served).linear_fn(model.weights)
    total, weights = 0.0, 0.0
    with torch.no_grad():
        for document in SFT_JOB.documents:
            ids = document.token_ids_n
            log_p = model.logits(model.hidden_states(ids, [0, len(ids)], linear)).log_softmax(-1)
            rows = document.scored_s - 1
            nll_s = -log_p[rows, ids[document.scored_s]]
            total += float((document.ce_weight_s * nll_s).sum())
            weights += float(document.ce_weight_s.sum())
    _, loss = step_gradients(served, SFT_JOB, [[0, 1], [2, 3]])
    assert loss == pytest.approx(total / weights, rel=1e-5)


def test_grpo_gradient_is_that_of_the_weighted_logprob_at_the_rollouts_temperature(served):
    """On policy the ratio's gradient is the log-probability's, which autograd gives from plain logits."""
    rollouts = [
        rollout(random_ids(3), random_ids(4 + i), float(i), temperature=0.5 + 0.4 * i) for i in range(3)
    ]
    job = prepare_grpo(grpo_spec([rollouts]))
    lora = adapter_in_use(served)
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    linear = lora.linear_fn(model.weights)
    objective = torch.zeros(())
    for document in job.documents:
        ids = document.token_ids_n
        logits = model.logits(model.hidden_states(ids, [0, len(ids)], linear)) / document.temperature
        log_p = logits.log_softmax(-1)[document.scored_s - 1, ids[document.scored_s]]
        objective = objective - document.advantage_s[0] * log_p.mean() / 3
    objective.backward()
    expected = {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}
    grads, _ = step_gradients(served, job, [[0, 2], [1]])
    assert_same(expected, grads)
