"""From a claimed job to what training needs: data, adapter, and an identity for its checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from kiln_common.errors import InvalidRequest, InvalidTokenIds
from kiln_common.pb import trainer_pb2
from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, parse_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_trainer.data.documents import Document, PreparedJob
from kiln_trainer.domain.training import TrainingTask
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.recipes.sft import prepare_sft

_DEFAULT_RANK = 16
_GROUPS = ("all", "attention", "mlp")


def prepare(request: trainer_pb2.SubmitRequest) -> PreparedJob:
    """Let the request's recipe make its documents.

    Raises:
        InvalidRequest: there is no recipe, or what the recipe raises.
    """
    match request.WhichOneof("recipe"):
        case "sft":
            return prepare_sft(request.sft)
        case "grpo":
            return prepare_grpo(request.grpo)
        case _:
            raise InvalidRequest("the job names no recipe", hint="Give sft or grpo.")


def check_documents(documents: Sequence[Document], config: ModelConfig) -> None:
    """Check that the model can read every document.

    Raises:
        InvalidTokenIds: a token id is outside the vocabulary.
        InvalidRequest: a document has more tokens than the model has positions.
    """
    for index, document in enumerate(documents):
        lowest, highest = document.token_ids_n.aminmax()
        if lowest < 0 or highest >= config.vocab_size:
            worst = int(lowest if lowest < 0 else highest)
            raise InvalidTokenIds(
                f"document {index} has token id {worst}, the vocabulary has {config.vocab_size}"
            )
        if document.num_tokens > config.max_position_embeddings:
            raise InvalidRequest(
                f"document {index} has {document.num_tokens} tokens,"
                f" the model has {config.max_position_embeddings} positions"
            )


def starting_adapter(task: TrainingTask, config: ModelConfig, device: torch.device) -> LoraParameters:
    """The adapter as it is before the first step: an existing version's tensors, or a fresh draw.

    Raises:
        KilnNnError: the existing version or the wanted shape does not fit the model.
    """
    point = task.starting_point
    if point is not None:
        adapter = parse_adapter(point.config_json, point.safetensors_path.read_bytes(), config)
        return LoraParameters.from_tensors(config, adapter.spec, adapter.tensors, device=device)
    wire = task.request.config
    return LoraParameters.create(config, lora_spec(wire.lora), seed=wire.seed, device=device)


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
