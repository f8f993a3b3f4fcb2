"""From a claimed job to what training needs: data, adapter, and an identity for its checkpoints."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from kiln_common.adapter_names import BASE_NAME
from kiln_common.errors import InvalidRequest
from kiln_common.pb import trainer_pb2
from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, mtp_table, parse_adapter
from kiln_nn.lora.parameters import LoraParameters, fresh_tensors
from kiln_trainer.domain.errors import ModelWithoutMtp, NoLearningSignal
from kiln_trainer.domain.training import StartingPoint, TrainingTask
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.recipes.opd import prepare_opd
from kiln_trainer.recipes.opd_options import OpdOptions
from kiln_trainer.recipes.options import RunOptions
from kiln_trainer.recipes.sft import prepare_sft
from kiln_trainer.torch_backend.document_checks import check_documents
from kiln_trainer.torch_backend.steps import FixedSteps, SampledSteps, StepSource
from kiln_trainer.torch_backend.teacher_scores import TeacherTops

_DEFAULT_RANK = 16
_GROUPS = ("all", "attention", "mlp")


def step_source(task: TrainingTask, options: RunOptions, config: ModelConfig, job_hash: str) -> StepSource:
    """Let the request's recipe make its documents, or a plan for sampling them.

    Raises:
        NoLearningSignal: a student is to learn from a teacher that it equals.
        InvalidTokenIds, InvalidRequest: the model cannot read a document, there is no recipe, or
            what the recipe raises.
    """
    request = task.request
    match request.WhichOneof("recipe"):
        case "sft":
            job = prepare_sft(request.sft)
        case "grpo":
            job = prepare_grpo(request.grpo)
        case "opd":
            _check_teacher(task)
            folder, teacher = task.checkpoint_dir, None
            if task.scorer is not None:
                teacher = TeacherTops(task.scorer, folder, job_hash)
            if request.opd.prompts:
                assert task.sampler is not None, "a job with prompts comes with a sampler"
                return SampledSteps(request.opd, task.sampler, options, config, folder, job_hash, teacher)
            rollouts = request.opd.rollouts
            tops = teacher.of("given", rollouts) if teacher is not None else None
            job = prepare_opd(rollouts, OpdOptions.from_proto(request.opd.settings).objective, tops)
        case _:
            raise InvalidRequest("the job names no recipe", hint="Give sft, grpo or opd.")
    check_documents(job.documents, config)
    return FixedSteps(job, options)


def _check_teacher(task: TrainingTask) -> None:
    student = task.starting_point.reference if task.starting_point is not None else BASE_NAME
    if student == task.request.opd.settings.teacher:
        raise NoLearningSignal(
            f"the student begins as its own teacher, {student}",
            hint="Name another teacher, or another base_adapter to start from.",
        )


def teacher_adapter(task: TrainingTask, config: ModelConfig, device: torch.device) -> LoraParameters | None:
    """The adapter that teaches, if one does. Raises KilnNnError where it does not fit the model."""
    return _existing_adapter(task.teacher, config, device) if task.teacher is not None else None


def starting_adapter(task: TrainingTask, config: ModelConfig, device: torch.device) -> LoraParameters:
    """The adapter as it is before the first step: an existing version's tensors, or a fresh draw.

    Raises:
        ModelWithoutMtp: it is to adapt a layer that the model does not have.
        KilnNnError: the existing version or the wanted shape does not fit the model.
    """
    wire = task.request.config
    if wire.train_mtp and not config.num_mtp_layers:
        raise ModelWithoutMtp("the base model has no multi-token-prediction layer")
    if task.starting_point is not None:
        return _existing_adapter(
            task.starting_point, config, device, mtp_seed=wire.seed if wire.train_mtp else None
        )
    spec = replace(lora_spec(wire.lora), with_mtp=wire.train_mtp)
    return LoraParameters.create(config, spec, seed=wire.seed, device=device)


def _existing_adapter(
    point: StartingPoint, config: ModelConfig, device: torch.device, mtp_seed: int | None = None
) -> LoraParameters:
    """With a seed it adapts the multi-token-prediction layers too, afresh where it has not before."""
    adapter = parse_adapter(point.config_json, point.safetensors_path.read_bytes(), config)
    spec, tensors = adapter.spec, adapter.tensors
    if mtp_seed is not None and not spec.with_mtp:
        spec = replace(spec, with_mtp=True)
        tensors = {**tensors, **fresh_tensors(mtp_table(config), spec.rank, mtp_seed)}
    return LoraParameters.from_tensors(config, spec, tensors, device=device)


def lora_spec(wire: trainer_pb2.LoraConfig) -> LoraSpec:
    """The wanted shape; left out: rank 16, alpha twice the rank, all linear layers."""
    rank = wire.rank or _DEFAULT_RANK
    targets = tuple(wire.targets) or ("all",)
    # A group may stand beside single layers: spell all of them out.
    names = [name for t in targets for name in (LoraSpec(1, 1.0, t).target_names if t in _GROUPS else (t,))]
    single = targets[0] if len(targets) == 1 and targets[0] in _GROUPS else tuple(dict.fromkeys(names))
    return LoraSpec(rank, wire.alpha or 2.0 * rank, single)  # type: ignore[arg-type]


def job_hash(task: TrainingTask, model_hash: str) -> str:
    """Identity of the computation: request, starting version, base. Checkpoints of another are not used."""
    digest = hashlib.sha256(task.request.SerializeToString(deterministic=True))
    digest.update(f"{task.starting_point.reference if task.starting_point else ''} {model_hash}".encode())
    return digest.hexdigest()
