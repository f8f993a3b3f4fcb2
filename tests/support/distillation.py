"""Builders for distillation jobs: requests, a teacher, and a student sampled without an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_nn.lora import parse_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.domain.training import AdapterContent, StartingPoint, TeacherScores
from kiln_trainer.torch_backend.backend import TorchBackend
from tests.support.training import (
    RecordingHooks,
    ServedModel,
    job_config,
    peft_folder,
    sft_request,
    starting_point,
    task,
)

PROMPTS = [[7, 8, 9], [20, 21], [101, 5, 66, 14], [250]]


def opd_request(
    prompts: Sequence[Sequence[int]] = (),
    rollouts: Sequence[trainer_pb2.OpdRollout] = (),
    *,
    teacher: str = "teacher@1",
    max_tokens: int = 6,
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> trainer_pb2.SubmitRequest:
    """A distillation job; `settings` are fields of OpdSettings."""
    sampling = engine_pb2.SamplingParams(max_tokens=max_tokens, temperature=1, top_p=1, repetition_penalty=1)
    spec = trainer_pb2.OpdSpec(
        settings=trainer_pb2.OpdSettings(teacher=teacher, sampling=sampling, **(settings or {})),
        prompts=[trainer_pb2.OpdPrompt(token_ids=prompt) for prompt in prompts],
        rollouts=rollouts,
    )
    return trainer_pb2.SubmitRequest(config=job_config(**config), opd=spec)


def teacher_in(folder: Path, served: ServedModel) -> StartingPoint:
    """An adapter that has learned to write a few tokens mostly, as a job left it in a PEFT folder."""
    rng = random.Random(2)
    examples = [[*prompt, *rng.choices(range(40, 52), k=8)] for prompt in PROMPTS for _ in range(4)]
    request = sft_request(examples, epochs=12, learning_rate=4e-3, batch_tokens=256, checkpoint_every=100)
    result = TorchBackend(served.locate).run(task(request, folder), RecordingHooks())
    return starting_point("teacher@1", peft_folder(result, folder / "result"))


def adapter_at(served: ServedModel, folder: Path | None) -> LoraParameters | None:
    """The adapter of a PEFT folder, to compute with."""
    if folder is None:
        return None
    point = starting_point("any@1", folder)
    return adapter_of(served, point.config_json, point.safetensors_path.read_bytes())


def adapter_of(served: ServedModel, config_json: str, safetensors: bytes) -> LoraParameters:
    read = parse_adapter(config_json, safetensors, served.loaded.config)
    return LoraParameters.from_tensors(served.loaded.config, read.spec, read.tensors)


def log_probabilities(
    served: ServedModel, lora: LoraParameters | None, token_ids: Sequence[int]
) -> torch.Tensor:
    """[tokens, vocabulary] from plain logits, of what follows each token."""
    model = PackedModel(served.loaded.config, served.loaded.arena.views())
    linear = lora.linear_fn(model.weights) if lora is not None else None
    hidden = model.hidden_states(torch.tensor([*token_ids]), [0, len(token_ids)], linear)
    return model.logits(hidden).log_softmax(-1)


@dataclass
class ModelSampler:
    """A StudentSampler that draws from the true student, token by token, with the seeds it is given.

    `students` are the adapters it was given, as files; None for the starting point.
    """

    served: ServedModel
    num_tokens: int = 6
    start: Path | None = None
    students: list[bytes | None] = field(default_factory=list)

    @torch.no_grad()
    def sample(
        self, student: AdapterContent | None, prompts: Sequence[tuple[Sequence[int], int]]
    ) -> list[trainer_pb2.OpdRollout]:
        self.students.append(None if student is None else bytes(student.view()))
        model = PackedModel(self.served.loaded.config, self.served.loaded.arena.views())
        if student is None:
            lora = adapter_at(self.served, self.start)
        else:
            lora = adapter_of(self.served, student.config_json, bytes(student.view()))
        linear = lora.linear_fn(model.weights) if lora is not None else None
        generators = [torch.Generator().manual_seed(seed % 2**63) for _, seed in prompts]
        rollouts = [
            trainer_pb2.OpdRollout(prompt_token_ids=prompt, is_truncated=True, source="rollout")
            for prompt, _ in prompts
        ]
        for _ in range(self.num_tokens):
            rows = [[*rollout.prompt_token_ids, *rollout.completion_token_ids] for rollout in rollouts]
            bounds = [0, *accumulate(len(row) for row in rows)]
            token_ids_T = torch.tensor([token for row in rows for token in row])
            hidden_TD = model.hidden_states(token_ids_T, bounds, linear)
            log_p_RV = model.logits(hidden_TD[torch.tensor(bounds[1:]) - 1]).log_softmax(-1)
            for rollout, log_p, generator in zip(rollouts, log_p_RV, generators, strict=True):
                token = int(torch.multinomial(log_p.exp(), 1, generator=generator))
                rollout.completion_token_ids.append(token)
                rollout.logprobs.append(float(log_p[token]))
        return rollouts


@dataclass
class ModelTeacher:
    """A TeacherScorer on a served model of its own, as plain logits have it; it remembers what it was asked."""

    served: ServedModel
    top_k: int
    lora: LoraParameters | None = None
    asked: list[int] = field(default_factory=list)

    @torch.no_grad()
    def score(self, rollouts: Sequence[trainer_pb2.OpdRollout]) -> list[TeacherScores]:
        self.asked.append(len(rollouts))
        scores = []
        for rollout in rollouts:
            token_ids = [*rollout.prompt_token_ids, *rollout.completion_token_ids]
            log_q_TV = log_probabilities(self.served, self.lora, token_ids)
            top = log_q_TV[len(rollout.prompt_token_ids) - 1 : -1].topk(self.top_k, dim=-1)
            ids, logprobs = top.indices.to(torch.int32), top.values.float()
            scores.append(TeacherScores(self.top_k, ids.numpy().tobytes(), logprobs.numpy().tobytes()))
        return scores
