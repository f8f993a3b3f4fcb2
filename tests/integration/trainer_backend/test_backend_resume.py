"""A job that was interrupted anywhere ends with the bytes of one that was not."""

from __future__ import annotations

import random

import pytest

from kiln_trainer.domain.errors import JobCancelled, WeightsLost
from kiln_trainer.torch_backend.backend import TorchBackend
from tests.support.training import RecordingHooks, grpo_request, rollout, served_model, sft_request, task

RNG = random.Random(5)


def random_ids(count: int) -> list[int]:
    return [RNG.randrange(300) for _ in range(count)]


GROUPS = [
    [
        rollout(random_ids(4), random_ids(6), float(i), behaviour_logprobs=[-4.0] * 6 if i % 2 else [])
        for i in range(3)
    ]
    for _ in range(2)
]
REQUESTS = {
    "sft": sft_request(
        [random_ids(RNG.randrange(4, 20)) for _ in range(6)],
        epochs=2,
        batch_tokens=32,
        gradient_accumulation=1,
        checkpoint_every=2,
        schedule="cosine",
        warmup_ratio=0.2,
        weight_decay=0.1,
        max_grad_norm=1.0,
    ),
    # Several steps to an epoch, rollouts with and without a known sampler, and a reference: every
    # stream that must survive an interruption is in use.
    "grpo": grpo_request(
        GROUPS,
        {"kl_coef": 0.1, "kl_estimator": "k3", "importance_mode": "token"},
        epochs=2,
        batch_tokens=20,
        gradient_accumulation=1,
        checkpoint_every=2,
    ),
    # The masks of a step do not depend on where the job was interrupted.
    "dropout": grpo_request(
        GROUPS,
        {"importance_mode": "token"},
        epochs=2,
        batch_tokens=20,
        gradient_accumulation=1,
        checkpoint_every=2,
        dropout=0.3,
        type="muon",
    ),
    "grpo_uncorrected": grpo_request(
        GROUPS,
        {"importance_mode": "none"},
        epochs=3,
        batch_tokens=40,
        gradient_accumulation=1,
        checkpoint_every=3,
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_interrupted_at_every_step_the_result_is_byte_identical(served, tmp_path, name):
    request = REQUESTS[name]
    undisturbed = RecordingHooks()
    result = TorchBackend(served.locate).run(task(request, tmp_path / "undisturbed"), undisturbed)
    num_steps = undisturbed.reports[-1].num_steps
    assert num_steps >= 4
    for step in range(1, num_steps + 1):
        job = task(request, tmp_path / f"interrupted-{step}")
        broken = RecordingHooks(step, WeightsLost("the engine is gone"))
        with pytest.raises(WeightsLost):
            TorchBackend(served.locate).run(job, broken)
        resumed = RecordingHooks()
        again = TorchBackend(served.locate).run(job, resumed)
        assert again.content.view() == result.content.view(), step
        # It went on from the last checkpoint instead of starting over.
        last_saved = broken.checkpoints[-1] if broken.checkpoints else 0
        assert [report.step for report in resumed.reports] == list(range(last_saved + 1, num_steps + 1))
        if resumed.reports:
            assert resumed.reports[-1].num_tokens == undisturbed.reports[-1].num_tokens
        assert again.metrics == result.metrics


def test_interrupted_again_and_again_with_a_damaged_checkpoint_between(served, tmp_path):
    request = REQUESTS["grpo"]
    result = TorchBackend(served.locate).run(task(request, tmp_path / "undisturbed"), RecordingHooks())
    job = task(request, tmp_path / "interrupted")
    for step in (3, 5):
        with pytest.raises(WeightsLost):
            TorchBackend(served.locate).run(job, RecordingHooks(step, WeightsLost("gone")))
    newest = max(job.checkpoint_dir.glob("step-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    again = TorchBackend(served.locate).run(job, RecordingHooks())
    assert again.content.view() == result.content.view()


def test_a_finished_job_run_again_repeats_what_no_checkpoint_holds_and_exports_the_same(served, tmp_path):
    job = task(REQUESTS["sft"], tmp_path / "job")
    hooks, again = RecordingHooks(), RecordingHooks()
    first = TorchBackend(served.locate).run(job, hooks).content.view()
    # The end itself is not saved: the adapter is published instead.
    assert 0 < hooks.checkpoints[-1] < hooks.reports[-1].step
    assert TorchBackend(served.locate).run(job, again).content.view() == first
    assert again.reports[0].step == hooks.checkpoints[-1] + 1


def test_another_request_in_the_same_folder_starts_over(served, tmp_path):
    TorchBackend(served.locate).run(task(REQUESTS["sft"], tmp_path), RecordingHooks())
    hooks = RecordingHooks()
    TorchBackend(served.locate).run(task(REQUESTS["grpo"], tmp_path), hooks)
    assert hooks.reports[0].step == 1


def test_checkpoints_made_on_other_base_weights_are_not_gone_on_from(served, tmp_path):
    """A job that names no base model, whose engine came back with another checkpoint."""
    TorchBackend(served.locate).run(task(REQUESTS["sft"], tmp_path / "job"), RecordingHooks())
    with served_model(tmp_path / "other", seed=9) as other:
        assert other.loaded.manifest.model_hash != served.loaded.manifest.model_hash
        hooks = RecordingHooks()
        backend = TorchBackend(other.locate)
        backend.run(task(REQUESTS["sft"], tmp_path / "job"), hooks)
        backend.close()
    assert hooks.reports[0].step == 1


def test_a_cancelled_job_leaves_no_adapter_behind(served, tmp_path):
    with pytest.raises(JobCancelled):
        TorchBackend(served.locate).run(
            task(REQUESTS["sft"], tmp_path), RecordingHooks(2, JobCancelled("cancelled"))
        )
    assert not (tmp_path / "adapter").exists()


def test_a_lost_claim_is_noticed_before_the_checkpoint_is_written(served, tmp_path):
    class LosesClaim(RecordingHooks):
        def before_checkpoint(self, step: int) -> None:
            raise WeightsLost("somebody else has it")

    with pytest.raises(WeightsLost):
        TorchBackend(served.locate).run(task(REQUESTS["sft"], tmp_path), LosesClaim())
    assert list(tmp_path.iterdir()) == []


def test_a_version_on_the_way_is_the_adapter_after_that_step_and_changes_nothing(served, tmp_path):
    request = REQUESTS["sft"]
    plain = TorchBackend(served.locate).run(task(request, tmp_path / "plain"), RecordingHooks())
    publishing = type(request)()
    publishing.CopyFrom(request)
    publishing.config.publish = "2"
    hooks = RecordingHooks()
    result = TorchBackend(served.locate).run(task(publishing, tmp_path / "publishing"), hooks)
    num_steps = hooks.reports[-1].step
    assert (result.step, [*hooks.published]) == (num_steps, [*range(2, num_steps, 2)])
    assert bytes(result.content.view()) == bytes(plain.content.view())
    assert len({*hooks.published.values(), bytes(plain.content.view())}) == len(hooks.published) + 1
