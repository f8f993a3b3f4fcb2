"""Refuses a job that the trainer's memory cannot hold, before it is accepted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from kiln_common.errors import ErrorKind, KilnError
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_trainer.domain.capacity import Capacity, MemoryNeeds, largest_batch, memory_needs
from kiln_trainer.recipes.opd_options import OpdOptions
from kiln_trainer.recipes.options import RunOptions

_DEFAULT_RANK = 16
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


class JobExceedsMemory(KilnError):
    """The adapter, its optimiser and one micro-batch do not fit beside what is there."""

    code = "job_exceeds_memory"
    kind = ErrorKind.TOO_LARGE
    hint = "Lower batch_tokens, lora.rank or lora.targets; details has the bytes of each part."

    def __init__(self, capacity: Capacity, needs: MemoryNeeds, num_tokens: int) -> None:
        fitting = largest_batch(capacity, needs)
        super().__init__(
            f"the job needs {needs.total_bytes} bytes, {capacity.available_bytes} are available: adapter "
            f"{needs.adapter_bytes}, optimizer {needs.optimizer_bytes}, activations of {num_tokens} tokens "
            f"{needs.activation_bytes}; the base model's {capacity.base_shared_bytes} are shared",
            param="batch_tokens",
            details={
                "base_shared_bytes": capacity.base_shared_bytes,
                "base_copied_bytes": capacity.base_copied_bytes,
                **asdict(needs),
                "total_bytes": needs.total_bytes,
                "available_bytes": capacity.available_bytes,
                "micro_batch_tokens": num_tokens,
                "largest_batch_tokens": fitting,
            },
        )


def check_capacity(
    request: trainer_pb2.SubmitRequest, engine: engine_pb2.EngineInfo | None, capacity: Capacity | None
) -> None:
    """Raises JobExceedsMemory.

    While no engine has answered or no weights are mapped nothing is known, and nothing refused; then
    the job runs out of memory when it runs.
    """
    if engine is None or capacity is None:
        return
    num_tokens = largest_micro_batch(request)
    rank = request.config.lora.rank or _DEFAULT_RANK
    needs = memory_needs(capacity, rank, _shapes(request.config, engine), num_tokens)
    if needs.total_bytes > capacity.available_bytes:
        raise JobExceedsMemory(capacity, needs, num_tokens)


def largest_micro_batch(request: trainer_pb2.SubmitRequest) -> int:
    """Most tokens that a micro-batch of the job can have: its limit, or all there are."""
    return min(RunOptions.from_proto(request.config).batch_tokens, sum(_lengths(request)))


def _lengths(request: trainer_pb2.SubmitRequest) -> Iterator[int]:
    yield from (len(example.token_ids) for example in request.sft.examples)
    grpo = (rollout for group in request.grpo.groups for rollout in group.rollouts)
    for rollout in (*grpo, *request.opd.rollouts):
        yield len(rollout.prompt_token_ids) + len(rollout.completion_token_ids)
    if request.opd.prompts:
        num_draws = OpdOptions.from_proto(request.opd.settings).samples_per_prompt
        max_tokens = request.opd.settings.sampling.max_tokens
        yield from (num_draws * (len(prompt.token_ids) + max_tokens) for prompt in request.opd.prompts)


def _shapes(config: trainer_pb2.JobConfig, engine: engine_pb2.EngineInfo) -> Iterator[tuple[int, int]]:
    if config.train_mtp:
        yield from ((module.in_features, module.out_features) for module in engine.base_model.draft_modules)
    targets = {*config.lora.targets} or {"all"}
    for module in engine.base_model.adaptable_modules:
        name = module.path.rpartition(".")[2]
        group = "mlp" if name in _MLP else "attention"
        if targets & {"all", group, name}:
            yield module.in_features, module.out_features
