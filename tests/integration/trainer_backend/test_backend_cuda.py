"""Training on a GPU, on weights another process owns, gives what training on the CPU gives.

Needs a CUDA device; the same jobs run on the CPU in the files beside this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_common.pb import trainer_pb2
from kiln_trainer.torch_backend.backend import TorchBackend
from tests.support.distillation import opd_request, teacher_in
from tests.support.tiny_models import WHOLE_GROUPS
from tests.support.trainer_process import run_in_process
from tests.support.training import RecordingHooks, grpo_request, rollout, served_model, sft_request, task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GROUP = [rollout([1, 2], [3 + i, 40 + i, 7], float(i), behaviour_logprobs=[-4.0] * 3) for i in range(4)]
GIVEN = [
    trainer_pb2.OpdRollout(prompt_token_ids=[1, 2], completion_token_ids=[3 + i, 40 + i, 7]) for i in range(4)
]
REQUESTS = {"sft": sft_request([[5, 201, 17, 88, 240, 3], [9, 8, 7, 6]], epochs=5, max_grad_norm=1.0)}
REQUESTS |= {
    loss_type: grpo_request(
        [GROUP],
        {"type": loss_type, "kl_coef": 0.1},
        epochs=3,
        learning_rate=1e-3,
        batch_tokens=10,
        gradient_accumulation=1,
        checkpoint_every=2,
    )
    for loss_type in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
}
REQUESTS |= {
    divergence: opd_request(rollouts=GIVEN, settings={"divergence": divergence}, epochs=3)
    for divergence in ("reverse_kl", "forward_kl", "jsd")
}


@pytest.mark.parametrize("name", REQUESTS)
def test_losses_on_the_gpu_follow_those_on_the_cpu(tmp_path, name):
    assert_gpu_follows_cpu(tmp_path, REQUESTS[name])


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_so_they_do_on_quantised_weights(tmp_path, scheme):
    assert_gpu_follows_cpu(tmp_path, REQUESTS["grpo"], loading={"quantization": scheme}, **WHOLE_GROUPS)


def assert_gpu_follows_cpu(tmp_path: Path, request: Any, **model: Any) -> None:
    with served_model(tmp_path / "cpu", **model) as served:
        teacher = None
        if request.HasField("opd"):
            teacher = teacher_in(tmp_path / "teacher", served)
        hooks = RecordingHooks()
        TorchBackend(served.locate).run(task(request, tmp_path / "cpu-job", teacher=teacher), hooks)
        expected = [report.metrics["loss"] for report in hooks.reports]
    with served_model(tmp_path / "gpu", "cuda", **model) as served:
        before = served.loaded.arena.checksum()
        folder = teacher.safetensors_path.parent if teacher else None
        seen = run_in_process(served, request, tmp_path / "gpu-job", teacher=folder)
        assert served.loaded.arena.checksum() == before
    # float32 on both; the GPU sums in another order and Adam's first steps magnify the difference.
    assert seen["losses"] == pytest.approx(expected, rel=2e-2, abs=2e-3)
    assert seen["losses"][0] == pytest.approx(expected[0], rel=1e-3, abs=1e-4)
    assert seen["num_allocated_base_bytes"] == 0
    assert seen["cuda_bytes"] > 0
