"""A teacher that is another engine's model: its likeliest tokens at each token of a completion."""

from __future__ import annotations

from collections.abc import Sequence

from kiln_common.ids import new_id
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_trainer.domain.training import TeacherScores
from kiln_trainer.jobs.claimed_job import ClaimedJob
from kiln_trainer.jobs.errors import TeacherAnswerIncomplete
from kiln_trainer.jobs.ports import Publisher
from kiln_trainer.recipes.opd_options import TeacherModel

_PRIORITY = 1  # whoever chats there goes first
_NUMBER_BYTES = 4
_NOTHING = TeacherScores(0, b"", b"")


class EngineTeacher:
    """A TeacherScorer. Belongs to the worker thread and to one claim."""

    def __init__(self, job: ClaimedJob, publisher: Publisher, teacher: TeacherModel) -> None:
        self._job = job
        self._publisher = publisher
        self._teacher = teacher

    def score(self, rollouts: Sequence[trainer_pb2.OpdRollout]) -> list[TeacherScores]:
        asked = [rollout for rollout in rollouts if rollout.completion_token_ids]
        requests = [self._request(rollout) for rollout in asked]
        answers = iter(self._publisher.generate(requests, self._job.check, self._teacher))
        return [
            _to_scores(rollout, next(answers)) if rollout.completion_token_ids else _NOTHING
            for rollout in rollouts
        ]

    def _request(self, rollout: trainer_pb2.OpdRollout) -> engine_pb2.GenerateRequest:
        return engine_pb2.GenerateRequest(
            request_id=new_id("opd"),
            prompt_token_ids=[*rollout.prompt_token_ids, *rollout.completion_token_ids],
            # Nothing is drawn: these are what the engine takes for neutral.
            sampling=engine_pb2.SamplingParams(temperature=1, top_p=1, repetition_penalty=1),
            num_prompt_logprobs=self._teacher.top_k,
            first_prompt_logprob=len(rollout.prompt_token_ids),
            packs_prompt_logprobs=True,
            priority=_PRIORITY,
        )


def _to_scores(
    rollout: trainer_pb2.OpdRollout, outputs: Sequence[engine_pb2.SequenceOutput]
) -> TeacherScores:
    """Raises TeacherAnswerIncomplete unless every token has as many alternatives as the others."""
    token_ids = b"".join(output.packed_top_token_ids for output in outputs)
    logprobs = b"".join(output.packed_top_logprobs for output in outputs)
    num_tokens = len(rollout.completion_token_ids)
    num_top, rest = divmod(len(token_ids), _NUMBER_BYTES * num_tokens)
    if not num_top or rest or len(token_ids) != len(logprobs):
        raise TeacherAnswerIncomplete(
            f"the teacher gave {len(token_ids)} bytes of tokens and {len(logprobs)} of log-probabilities "
            f"for {num_tokens} tokens"
        )
    return TeacherScores(num_top, token_ids, logprobs)
