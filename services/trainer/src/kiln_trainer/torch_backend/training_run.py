"""One job from its last checkpoint to its end.

Whatever the steps depend on is a function of the request, the starting adapter and the base
weights; what the past alone knows (parameters, moments, the old policy's log-probabilities) is in
the checkpoint. So an interrupted job ends with the same bytes on the CPU as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict

import structlog
import torch

from kiln_nn.lora.dropout import LoraDropout
from kiln_nn.packed_model import PackedModel
from kiln_nn.sharing import SealedAdapter
from kiln_trainer.data.documents import Document
from kiln_trainer.data.packing import PackedBatch, first_fit, pack
from kiln_trainer.domain.training import StepHooks, StepReport, TrainedAdapter, TrainingTask
from kiln_trainer.recipes.options import OptimizerOptions, PolicyObjective, RunOptions
from kiln_trainer.torch_backend import setup
from kiln_trainer.torch_backend.activation_memory import ActivationPlans
from kiln_trainer.torch_backend.checkpoints import Checkpoint, CheckpointFolder
from kiln_trainer.torch_backend.errors import BaseModelMismatch, TrainingDiverged
from kiln_trainer.torch_backend.gpu_share import GpuShare
from kiln_trainer.torch_backend.optimizer import AdapterOptimizer
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from kiln_trainer.torch_backend.steps import FixedSteps, StepData
from kiln_trainer.torch_backend.weights import WeightSession

log = structlog.get_logger()


class TrainingRun:
    """The state of one running job. Used by one thread, once.

    Raises:
        BaseModelMismatch: the engine serves another model than the job is for.
        KilnError, KilnNnError: the data, the settings or the starting adapter do not fit.
    """

    def __init__(
        self, task: TrainingTask, session: WeightSession, share: GpuShare, plans: ActivationPlans
    ) -> None:
        wanted = task.request.base_model_hash
        if wanted and wanted != session.model_hash:
            raise BaseModelMismatch(wanted, session.model_hash)
        self._task = task
        self._session = session
        self._share = share
        self._options = RunOptions.from_proto(task.request.config)
        self._job_hash = setup.job_hash(task, session.model_hash)
        self._source = setup.step_source(task, self._options, session.config, self._job_hash)
        lora = setup.starting_adapter(task, session.config, session.device)
        teacher = setup.teacher_adapter(task, session.config, session.device)
        model = PackedModel(session.config, session.weights)
        session.check_borrowed(model.weights)
        self._dropout = LoraDropout(self._options.dropout)
        linear = lora.linear_fn(model.weights, self._dropout)
        kind = (lora.spec, self._options.dropout > 0)
        self.plan = plans.of(kind, model, linear, session.device)
        log.info("activations_planned", **asdict(self.plan))
        self._policy = Policy(model, lora, session.device, self.plan, teacher, self._dropout)
        optimizer = OptimizerOptions.from_proto(task.request.config.optimizer)
        self._optimizer = AdapterOptimizer(lora, optimizer, self._source.num_steps)
        # Of every document, where a policy's loss compares it with what it was.
        self._scored: tuple[Document, ...] = ()
        if isinstance(self._source, FixedSteps) and isinstance(self._source.objective, PolicyObjective):
            self._scored = self._source.documents
        unknown = [torch.full((document.num_scored,), math.nan) for document in self._scored]
        self._old_logprobs, self._reference_logprobs = list(unknown), list(unknown)
        self._num_tokens = 0
        self._latest_metrics: dict[str, float] = {}

    def execute(self, hooks: StepHooks) -> None:
        """Go on from the newest checkpoint and take every remaining step.

        Raises:
            TrainingDiverged: a gradient or a parameter is not finite.
            WeightsLost: the engine is gone; the step it outlived was not applied.
        """
        checkpoints = CheckpointFolder(self._task.checkpoint_dir)
        saved = checkpoints.newest(self._job_hash)
        if saved is None:
            self._score_old_policy()
        else:
            self._restore(saved)
        num_steps = self._source.num_steps
        if self._optimizer.num_steps_done < num_steps:
            self._score_reference()
        for step in range(self._optimizer.num_steps_done + 1, num_steps + 1):
            report = self._take_step(step)
            hooks.after_step(report)
            is_last = step == num_steps
            is_due = step % self._options.checkpoint_every == 0
            publish_every = self._options.publish_every
            is_published = publish_every > 0 and step % publish_every == 0 and not is_last
            if is_last or is_due or is_published:
                self._check_parameters(step)
            if is_published:
                trained = self.trained()
                with contextlib.closing(trained.content):
                    hooks.publish(trained)
            # After the last step the adapter itself is about to be published.
            if is_due and not is_last:
                hooks.before_checkpoint(step)
                if checkpoints.write(self._checkpoint()):
                    self._source.forget(step)
                    hooks.after_checkpoint(step)

    def _take_step(self, step: int) -> StepReport:
        data = self._source.open(step, self._seal_student)
        sums = StepSums()
        self._optimizer.clear()
        own = [data.documents[index] for index in data.plan.documents]
        normaliser = math.fsum(document.normaliser for document in own)
        num_drafted = sum(document.num_drafted for document in own) if self._options.trains_mtp else 0
        for number, indices in enumerate(data.plan.micro_batches):
            self._share.between_micro_batches()
            self._dropout.begin(f"{self._options.seed}:{step}:{number}")
            old_S = forward_backward(
                self._policy,
                self._batch(data, indices),
                self._source.objective,
                normaliser,
                sums,
                is_first_step=step == 1,
                num_drafted=num_drafted,
            )
            if step == 1 and old_S is not None and self._source.num_steps > 1:
                self._keep_old_logprobs(indices, old_S)
        grad_norm = float(self._optimizer.clip())
        metrics = sums.metrics()
        if not (math.isfinite(grad_norm) and math.isfinite(metrics["loss"])):
            raise TrainingDiverged(
                f"step {step} has loss {metrics['loss']:g} and gradient norm {grad_norm:g}"
            )
        self._session.check_alive()  # a step computed on weights that may be gone is not applied
        rate = self._optimizer.step()
        self._share.work_done()
        self._num_tokens += data.num_tokens
        metrics |= {"grad_norm": grad_norm, "learning_rate": rate, "tokens": float(data.num_tokens)}
        metrics |= data.facts
        metrics |= self._share.take_metrics()
        self._latest_metrics |= metrics
        return StepReport(step, self._source.num_steps, self._num_tokens, metrics)

    def trained(self) -> TrainedAdapter:
        """The adapter as it is."""
        return TrainedAdapter(self._seal(), dict(self._latest_metrics), self._optimizer.num_steps_done)

    def _seal(self) -> SealedAdapter:
        lora = self._policy.lora
        return SealedAdapter(lora.tensors(), lora.spec, self._session.model_id)

    def _seal_student(self) -> SealedAdapter | None:
        """The adapter as it is, for the engine to sample; None before the first update."""
        if not self._optimizer.num_steps_done:
            return None
        self._check_parameters(self._optimizer.num_steps_done)
        return self._seal()

    def _check_parameters(self, step: int) -> None:
        largest = torch.nn.utils.get_total_norm(self._policy.lora.parameters(), math.inf)
        if not largest.isfinite():
            raise TrainingDiverged(f"the adapter is no longer finite after step {step}")

    def _batch(self, data: StepData, indices: tuple[int, ...]) -> PackedBatch:
        documents = [data.documents[index] for index in indices]
        if not self._scored:
            return pack(documents).to(self._session.device)
        return pack(
            documents,
            [self._old_logprobs[index] for index in indices],
            [self._reference_logprobs[index] for index in indices],
        ).to(self._session.device)

    def _keep_old_logprobs(self, indices: tuple[int, ...], old_S: torch.Tensor) -> None:
        sizes = [self._scored[index].num_scored for index in indices]
        for index, old_s in zip(indices, old_S.cpu().split(sizes), strict=True):
            self._old_logprobs[index] = old_s.clone()

    def _score_old_policy(self) -> None:
        """Score with the starting adapter what no pass before the first update will score anyway."""
        source, objective = self._source, self._source.objective
        if not (isinstance(source, FixedSteps) and isinstance(objective, PolicyObjective)):
            return
        # With dropout that pass is not the policy as it is.
        in_first_step = set() if self._options.dropout else set(source.plans[0].documents)
        wanted = [
            index
            for index, document in enumerate(self._scored)
            if index not in in_first_step and (objective.importance_mode != "none" or not document.is_sampled)
        ]
        self._score_into(self._old_logprobs, wanted, with_adapter=True)

    def _score_reference(self) -> None:
        """Score everything with the adapter off, if the loss pulls towards that."""
        objective = self._source.objective
        if isinstance(objective, PolicyObjective) and objective.kl_coef:
            every = list(range(len(self._scored)))
            self._score_into(self._reference_logprobs, every, with_adapter=False)

    def _score_into(self, stream: list[torch.Tensor], wanted: list[int], *, with_adapter: bool) -> None:
        batch_tokens = self._options.batch_tokens
        lengths = [document.num_tokens for document in self._scored]
        for chosen in first_fit(wanted, lengths, batch_tokens):
            self._share.between_micro_batches()
            for index, logprobs_s in self._policy.logprobs_of(
                self._scored, chosen, batch_tokens=batch_tokens, with_adapter=with_adapter
            ):
                stream[index] = logprobs_s.clone()

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"lora/{name}": t for name, t in self._policy.lora.state_dict().items()}
        tensors |= {f"moment/{name}": t for name, t in self._optimizer.moments().items()}
        if self._scored:
            tensors["stream/old_logprobs"] = torch.cat(self._old_logprobs)
        step = self._optimizer.num_steps_done
        return Checkpoint(step, self._num_tokens, self._job_hash, self._latest_metrics, tensors)

    def _restore(self, saved: Checkpoint) -> None:
        self._policy.lora.load_state_dict(saved.group("lora"))
        self._optimizer.restore(saved.group("moment"), saved.step)
        if self._scored:
            sizes = [document.num_scored for document in self._scored]
            self._old_logprobs = list(saved.tensors["stream/old_logprobs"].split(sizes))
        self._num_tokens = saved.num_tokens
        self._latest_metrics = dict(saved.metrics)
        log.info("training_resumed", job_id=self._task.job_id, step=saved.step)
