"""The student of a distillation job as the engine serves it: an unfinished adapter that is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from kiln_common.errors import KilnError
from kiln_common.ids import new_id
from kiln_common.pb import common_pb2, engine_pb2, registry_pb2, trainer_pb2
from kiln_trainer.domain.training import AdapterContent
from kiln_trainer.jobs.claimed_job import ClaimedJob
from kiln_trainer.jobs.ports import Publisher

log = structlog.get_logger()

_PRIORITY = 1  # whoever chats goes first


class EngineStudent:
    """A StudentSampler. Belongs to the worker thread and to one claim.

    Before its first update the student is the version it starts from, or the base model. After it,
    the engine gets it as a version of the adapter named like the job, which is deleted again as
    soon as its completions are there. It is never attached, and the name under which the job
    publishes goes on meaning what it meant.
    """

    def __init__(
        self,
        job: ClaimedJob,
        publisher: Publisher,
        request: trainer_pb2.SubmitRequest,
        base: registry_pb2.AdapterVersion | None,
        base_model_hash: Callable[[], str],
    ) -> None:
        self._job = job
        self._publisher = publisher
        self._sampling = request.opd.settings.sampling
        self._base = base
        self._base_model_hash = base_model_hash
        self._owner = request.owner

    def sample(
        self, student: AdapterContent | None, prompts: Sequence[tuple[Sequence[int], int]]
    ) -> list[trainer_pb2.OpdRollout]:
        if student is None:
            return self._draw(self._base, prompts)
        # Only the last claim may put a version into the registry.
        self._job.sync()
        # The other engines need not take it, and one of them may be away.
        version = self._publisher.publish(self._header(student.config_json), student, "sampler")
        try:
            # Its bytes must not go before the engine has taken them.
            self._publisher.make_live(version)
            return self._draw(version, prompts)
        finally:
            self._withdraw(version.name)

    def _draw(
        self, version: registry_pb2.AdapterVersion | None, prompts: Sequence[tuple[Sequence[int], int]]
    ) -> list[trainer_pb2.OpdRollout]:
        adapters = []
        if version is not None:
            adapters = [
                common_pb2.AdapterRef(name=version.name, version=version.version, sha256=version.sha256)
            ]
        requests = []
        for prompt_token_ids, seed in prompts:
            requests.append(
                engine_pb2.GenerateRequest(
                    request_id=new_id("opd"),
                    prompt_token_ids=prompt_token_ids,
                    sampling=self._sampling,
                    adapters=adapters,
                    cache_salt=self._job.claim.job_id,
                    priority=_PRIORITY,
                )
            )
            requests[-1].sampling.seed = seed
        completions = self._publisher.generate(requests, self._job.check)
        return [_to_rollout(request, outputs) for request, outputs in zip(requests, completions, strict=True)]

    def _header(self, config_json: str) -> registry_pb2.PublishHeader:
        claim = self._job.claim
        return registry_pb2.PublishHeader(
            name=claim.job_id,
            base_model_hash=self._base_model_hash(),
            config_json=config_json,
            parent_name=self._base.name if self._base else "",
            parent_version=self._base.version if self._base else 0,
            job_id=claim.job_id,
            claim_epoch=claim.claim_epoch,
            owner=self._owner,
        )

    def _withdraw(self, name: str) -> None:
        """What stays because the registry is away goes with the next version."""
        try:
            self._publisher.withdraw(name)
        except KilnError as error:
            log.warning("student_not_withdrawn", adapter=name, code=error.code, reason=str(error))


def _to_rollout(
    request: engine_pb2.GenerateRequest, outputs: Sequence[engine_pb2.SequenceOutput]
) -> trainer_pb2.OpdRollout:
    """The completion as a document."""
    return trainer_pb2.OpdRollout(
        prompt_token_ids=request.prompt_token_ids,
        completion_token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=[logprob for output in outputs for logprob in output.logprobs],
        is_truncated=outputs[-1].finish_reason == engine_pb2.FINISH_REASON_LENGTH,
        source="rollout",
    )
