"""One step that nobody asked for, so that the first job does not pay for what every first step does.

torch's optimisers import for seconds, and a GPU loads each kernel when it is first launched.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import structlog

from kiln_common.pb import trainer_pb2
from kiln_trainer.domain.training import StepReport, TrainedAdapter, TrainingTask
from kiln_trainer.torch_backend.activation_memory import ActivationPlan, ActivationPlans
from kiln_trainer.torch_backend.gpu_share import GpuShare
from kiln_trainer.torch_backend.training_run import TrainingRun
from kiln_trainer.torch_backend.weights import WeightSession

log = structlog.get_logger()

# As many as a short answer has where that takes no time, and no more than a few on a CPU.
_GPU_TOKENS, _CPU_TOKENS = 256, 4


class _NoHooks:
    def after_step(self, report: StepReport) -> None:
        pass

    def before_checkpoint(self, step: int) -> None:
        pass

    def after_checkpoint(self, step: int) -> None:
        pass

    def publish(self, trained: TrainedAdapter) -> None:
        pass


def warm_up(session: WeightSession, share: GpuShare, plans: ActivationPlans) -> ActivationPlan | None:
    """Train a throwaway adapter for one step and pack it; returns what its tokens took.

    A failure is logged, and left to the jobs.
    """
    started_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="kiln-warm-up-") as folder:
            task = TrainingTask("warm-up", _request(session.device.type == "cuda"), None, Path(folder), 0)
            with share.occupied():
                training = TrainingRun(task, session, share, plans)
                training.execute(_NoHooks())
                training.trained().content.close()
    except Exception as error:
        log.warning("trainer_not_warm", reason=str(error), exc_info=error)
        return None
    log.info("trainer_warm", seconds=round(time.monotonic() - started_s, 2))
    return training.plan


def _request(is_gpu: bool) -> trainer_pb2.SubmitRequest:
    num_tokens = _GPU_TOKENS if is_gpu else _CPU_TOKENS
    rollouts = [
        trainer_pb2.GrpoRollout(
            prompt_token_ids=[1] * num_tokens,
            completion_token_ids=[1] * num_tokens,
            reward=reward,
            behaviour_logprobs=[-1.0] * num_tokens,
            temperature=1.0,
        )
        for reward in (0.0, 1.0)
    ]
    loss = trainer_pb2.GrpoLoss(
        type="grpo", clip_low=0.2, clip_high=0.2, importance_mode="token", importance_cap=2.0
    )
    config = trainer_pb2.JobConfig(
        adapter="warm-up",
        epochs=1,
        batch_tokens=8 * num_tokens,
        checkpoint_every=2,
        lora=trainer_pb2.LoraConfig(targets=["all"]),
        optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-4, max_grad_norm=1.0),
    )
    group = trainer_pb2.GrpoGroup(rollouts=rollouts)
    return trainer_pb2.SubmitRequest(config=config, grpo=trainer_pb2.GrpoSpec(groups=[group], loss=loss))
