"""What a teacher on another engine says of completions: on disk before a step learns from it.

So a resumed job learns from the same numbers, and asks nobody again.

Legend: `s` tokens of one completion, `N` those of all, `K` likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import structlog
import torch
from safetensors.torch import load, save

from kiln_common.pb import trainer_pb2
from kiln_trainer.data.documents import TeacherTop
from kiln_trainer.domain.training import TeacherScorer, TeacherScores
from kiln_trainer.torch_backend.checkpoints import write_durably

log = structlog.get_logger()


class TeacherTops:
    """Asks once for each set of completions. `folder` and `job_hash` are those of the job's checkpoints."""

    def __init__(self, scorer: TeacherScorer, folder: Path, job_hash: str) -> None:
        self._scorer = scorer
        self._folder = folder
        self._job_tag = job_hash[:16]

    def of(self, name: str, rollouts: Sequence[trainer_pb2.OpdRollout]) -> list[TeacherTop]:
        """For each completion of the set `name`, in order."""
        path = self._folder / f"scores-{name}-{self._job_tag}.safetensors"
        if not path.exists():
            tops = [_to_tensors(scores) for scores in self._scorer.score(rollouts)]
            ids, logprobs = _joined([top.ids_sK for top in tops]), _joined([top.logprobs_sK for top in tops])
            write_durably(path, save({"ids": ids.to(torch.int32), "logprobs": logprobs}))
            log.info(
                "teacher_asked", set=name, rollouts=len(rollouts), tokens=ids.shape[0], top_k=ids.shape[1]
            )
        stored = load(path.read_bytes())
        sizes = [len(rollout.completion_token_ids) for rollout in rollouts]
        pairs = zip(stored["ids"].long().split(sizes), stored["logprobs"].split(sizes), strict=True)
        return [TeacherTop(ids_sK, logprobs_sK) for ids_sK, logprobs_sK in pairs]


def _to_tensors(scores: TeacherScores) -> TeacherTop:
    shape = (-1, max(scores.num_top, 1))
    ids = torch.frombuffer(bytearray(scores.token_ids), dtype=torch.int32) if scores.token_ids else None
    if ids is None:
        return TeacherTop(torch.empty(0, 0, dtype=torch.int32), torch.empty(0, 0))
    logprobs = torch.frombuffer(bytearray(scores.logprobs), dtype=torch.float32)
    return TeacherTop(ids.view(shape), logprobs.view(shape))


def _joined(parts_sK: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other, `[N, K]`; a completion without tokens has no K."""
    filled = [part for part in parts_sK if part.numel()]
    return torch.cat(filled) if filled else torch.empty(0, 0)
