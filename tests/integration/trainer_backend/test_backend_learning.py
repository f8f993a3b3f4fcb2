"""Jobs run to their end and teach what they should."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from kiln_common.errors import InvalidTokenIds, KilnError
from kiln_common.pb import trainer_pb2
from kiln_nn.lora import read_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.domain.errors import NoLearningSignal
from kiln_trainer.domain.training import StartingPoint
from kiln_trainer.torch_backend.backend import TorchBackend
from kiln_trainer.torch_backend.errors import BaseModelMismatch, TrainingDiverged
from kiln_trainer.torch_backend.optimizer import AdapterOptimizer
from tests.support.training import (
    RecordingHooks,
    ServedModel,
    grpo_request,
    job_config,
    peft_folder,
    rollout,
    sft_request,
    task,
)

PROMPT = [7, 8, 9]


def next_token_probabilities(served: ServedModel, prompt: list[int], adapter: Path | None) -> torch.Tensor:
    """[vocabulary] of the model after `prompt`, with the exported adapter if there is one."""
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    linear = None
    if adapter is not None:
        read = read_adapter(adapter, served.loaded.config)
        linear = LoraParameters(read.spec, read.tensors).linear_fn(model.weights)
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor(prompt), [0, len(prompt)], linear)
        return model.logits(hidden[-1:])[0].softmax(-1)


def even_share(served: ServedModel, adapter: Path | None = None) -> float:
    return float(next_token_probabilities(served, PROMPT, adapter)[::2].sum())


def sampled_tokens(served: ServedModel, count: int) -> tuple[list[int], torch.Tensor]:
    probabilities = next_token_probabilities(served, PROMPT, None)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    return drawn.tolist(), probabilities.log()


def even_token_job(
    served: ServedModel, *, is_shuffled: bool, count: int = 64
) -> list[trainer_pb2.GrpoRollout]:
    """Single-token rollouts drawn from the model; even tokens are rewarded.

    Shuffled, as many get a reward, but evenly among even and odd tokens: it teaches nothing.
    """
    tokens, logprobs = sampled_tokens(served, count)
    rewards = [float(token % 2 == 0) for token in tokens]
    if is_shuffled:
        share = sum(rewards) / len(rewards)
        for parity in (0, 1):
            places = [place for place, token in enumerate(tokens) if token % 2 == parity]
            random.Random(parity).shuffle(places)
            for rank, place in enumerate(places):
                rewards[place] = float(rank < share * len(places))
    return [
        rollout(PROMPT, [token], reward, behaviour_logprobs=[float(logprobs[token])], source="rollout")
        for token, reward in zip(tokens, rewards, strict=True)
    ]


@pytest.mark.parametrize(
    ("loss", "epochs", "learning_rate", "noise"),
    [
        # Steps that a few of them clip most ratios; much larger ones leave them behind at once, and wander.
        ({"type": "grpo"}, 6, 1e-3, 0.03),
        ({"type": "dr_grpo"}, 6, 1e-3, 0.03),
        ({"type": "dapo"}, 6, 1e-3, 0.03),
        # Its own bounds are for updates far smaller than these few large ones.
        ({"type": "gspo", "clip_low": 0.2, "clip_high": 0.2}, 6, 1e-3, 0.03),
        # Nothing holds it near the start, so it gets fewer and smaller steps, and follows noise further.
        ({"type": "cispo"}, 2, 5e-4, 0.055),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_a_loss_raises_what_was_rewarded_and_not_what_was_rewarded_at_random(
    served, tmp_path, loss, epochs, learning_rate, noise
):
    before = even_share(served)
    shares = {}
    for is_shuffled in (False, True):
        request = grpo_request(
            # So many that what their draws have by chance teaches little.
            [even_token_job(served, is_shuffled=is_shuffled, count=256)],
            loss,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_tokens=1024,
        )
        result = TorchBackend(served.locate).run(task(request, tmp_path / str(is_shuffled)), RecordingHooks())
        shares[is_shuffled] = even_share(served, peft_folder(result, tmp_path / "result"))
    assert shares[False] > before + 1.5 * noise
    assert abs(shares[True] - before) < noise


def test_grpo_reports_what_the_job_is_judged_by(served, tmp_path):
    hooks = RecordingHooks()
    request = grpo_request(
        [even_token_job(served, is_shuffled=False), [rollout([1], [2], 0.5)] * 2],
        {"kl_coef": 0.05},
        epochs=2,
        batch_tokens=1024,
    )
    result = TorchBackend(served.locate).run(task(request, tmp_path), hooks)
    first, second = (report.metrics for report in hooks.reports)
    assert first["num_groups_skipped"] == 1
    assert first["tokens"] == 64 * 4
    assert [report.num_tokens for report in hooks.reports] == [256, 512]
    # The rollouts came from these very weights: engine and trainer agree but for rounding.
    assert 0 <= first["sampler_trainer_kl"] < 1e-9
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-4
    assert first["clip_fraction"] == 0
    assert 0 < first["entropy"] < math.log(300)
    assert first["grad_norm"] > 0
    assert first["learning_rate"] == 1e-2
    assert result.metrics["advantage_mean"] == pytest.approx(0, abs=1e-9)


def test_on_policy_jobs_of_one_step_run_no_extra_forward_pass(served, tmp_path, monkeypatch):
    request = grpo_request([even_token_job(served, is_shuffled=False)], batch_tokens=1024)
    passes = []
    forward = PackedModel.forward
    monkeypatch.setattr(
        PackedModel, "forward", lambda self, *args, **kw: passes.append(args[1]) or forward(self, *args, **kw)
    )
    TorchBackend(served.locate).run(task(request, tmp_path), RecordingHooks())
    # One document of no job weighs the activations first.
    assert [len(cu_seqlens) - 1 for cu_seqlens in passes] == [1, 64]


def test_sft_learns_one_document_by_heart(served, tmp_path):
    document = [5, 201, 17, 88, 240, 3, 150]
    request = sft_request([document], epochs=60, learning_rate=1e-2, checkpoint_every=60)
    hooks = RecordingHooks()
    result = TorchBackend(served.locate).run(task(request, tmp_path), hooks)
    assert hooks.reports[0].metrics["loss"] > 3
    assert hooks.reports[-1].metrics["loss"] < 0.05
    for position in range(1, len(document)):
        likely = next_token_probabilities(
            served, document[:position], peft_folder(result, tmp_path / "result")
        )
        assert int(likely.argmax()) == document[position]


def test_training_goes_on_from_an_existing_version(served, tmp_path):
    document = [5, 201, 17, 88]
    request = sft_request([document], epochs=5, rank=2, targets=["mlp", "q_proj"])
    first = TorchBackend(served.locate).run(task(request, tmp_path / "first"), RecordingHooks())
    start = StartingPoint(
        "test@1",
        first.content.config_json,
        peft_folder(first, tmp_path / "start") / "adapter_model.safetensors",
    )
    hooks = RecordingHooks()
    # The existing version's shape counts, not the one this request asks for.
    again = sft_request([document], epochs=1, rank=8)
    second = TorchBackend(served.locate).run(task(again, tmp_path / "second", start), hooks)
    assert hooks.reports[0].metrics["loss"] < first.metrics["loss"]
    adapter = read_adapter(peft_folder(second, tmp_path / "result"), served.loaded.config)
    assert adapter.spec.rank == 2
    assert {path.rpartition(".")[2] for path in adapter.tensors} == {
        "gate_proj",
        "up_proj",
        "down_proj",
        "q_proj",
    }


def test_a_job_for_another_base_model_is_refused(served, tmp_path):
    request = sft_request([[1, 2, 3]])
    request.base_model_hash = "0" * 64
    with pytest.raises(BaseModelMismatch) as caught:
        TorchBackend(served.locate).run(task(request, tmp_path), RecordingHooks())
    assert caught.value.code == "base_model_mismatch"
    request.base_model_hash = served.loaded.manifest.model_hash
    TorchBackend(served.locate).run(task(request, tmp_path), RecordingHooks())


def test_a_step_that_diverges_is_not_applied(served, tmp_path):
    hooks = RecordingHooks()
    request = sft_request([[1, 2, 3]], epochs=4, learning_rate=1e30, checkpoint_every=1)
    with pytest.raises(TrainingDiverged, match=r"step \d has loss"):
        TorchBackend(served.locate).run(task(request, tmp_path), hooks)
    assert len(hooks.checkpoints) < 4


def test_an_adapter_that_is_not_finite_is_neither_saved_nor_exported(served, tmp_path, monkeypatch):
    step = AdapterOptimizer.step

    def overflow(optimizer: AdapterOptimizer) -> float:
        rate = step(optimizer)
        next(iter(optimizer._parameters.values())).data.fill_(math.inf)
        return rate

    monkeypatch.setattr(AdapterOptimizer, "step", overflow)
    with pytest.raises(TrainingDiverged, match="no longer finite after step 1"):
        TorchBackend(served.locate).run(task(sft_request([[1, 2, 3]]), tmp_path), RecordingHooks())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad_id", [300, -1, 2**40])
def test_token_ids_outside_the_vocabulary_are_refused(served, tmp_path, bad_id):
    with pytest.raises(InvalidTokenIds, match=str(bad_id)):
        TorchBackend(served.locate).run(task(sft_request([[1, bad_id]]), tmp_path), RecordingHooks())


def test_a_document_beyond_the_models_positions_is_refused(served, tmp_path):
    request = sft_request([[1] * 4097], batch_tokens=5000)
    with pytest.raises(KilnError, match="4097 tokens"):
        TorchBackend(served.locate).run(task(request, tmp_path), RecordingHooks())


def test_errors_of_the_model_side_keep_their_code_and_hint(served, tmp_path):
    for request, code in (
        (sft_request([[1, 2]], targets=["no_such_proj"]), "invalid_lora_spec"),
        (sft_request([[1, 2]], alpha=-1.0), "invalid_lora_spec"),
    ):
        with pytest.raises(KilnError) as caught:
            TorchBackend(served.locate).run(task(request, tmp_path), RecordingHooks())
        assert caught.value.code == code
        assert caught.value.hint
        assert caught.value.kind.http_status == 400


def test_an_adapter_of_another_model_cannot_be_the_start(served, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"not safetensors")
    start = StartingPoint("x@1", '{"peft_type": "LORA", "r": 1, "lora_alpha": 1}', tmp_path / "w.safetensors")
    with pytest.raises(KilnError) as caught:
        TorchBackend(served.locate).run(task(sft_request([[1, 2]]), tmp_path / "j", start), RecordingHooks())
    assert caught.value.code == "invalid_adapter"


def test_a_job_without_recipe_or_signal_fails_by_name(served, tmp_path):
    with pytest.raises(KilnError, match="no recipe"):
        TorchBackend(served.locate).run(
            task(trainer_pb2.SubmitRequest(config=job_config()), tmp_path), RecordingHooks()
        )
    with pytest.raises(NoLearningSignal):
        TorchBackend(served.locate).run(
            task(grpo_request([[rollout([1], [2], 1.0)] * 2]), tmp_path), RecordingHooks()
        )


@pytest.mark.parametrize("fields", [{"type": "muon"}, {"dropout": 0.2}], ids=["muon", "dropout"])
def test_a_job_with_another_optimiser_or_with_dropout_learns_its_example(served, tmp_path, fields):
    answer = [40, 41, 42, 43]
    request = sft_request([[*PROMPT, *answer]], num_prompt=3, epochs=30, learning_rate=1e-2, **fields)
    hooks = RecordingHooks()
    result = TorchBackend(served.locate).run(task(request, tmp_path / "job"), hooks)
    losses = [report.metrics["loss"] for report in hooks.reports]
    assert losses[-1] < 0.2 * losses[0], losses
    adapter = peft_folder(result, tmp_path / "adapter")
    assert next_token_probabilities(served, PROMPT, adapter)[40] > 0.5
