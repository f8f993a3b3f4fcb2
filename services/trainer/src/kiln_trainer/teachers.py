"""The engines of other models: who they are, and what they say of a student's completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
from redis.exceptions import RedisError

from kiln_common.bus.engine_presence import read_words
from kiln_common.clients.engine import EngineClient
from kiln_common.errors import KilnError
from kiln_common.pb import common_pb2, engine_pb2
from kiln_trainer.completions import draw_all
from kiln_trainer.jobs.errors import TeacherChanged, TeacherNotFound, TeacherUnavailable
from kiln_trainer.recipes.opd_options import TeacherModel

log = structlog.get_logger()


class TeacherDirectory:
    """Engines named by the settings, and those that announce themselves on Redis; used on the event loop.

    Where an engine is comes from the operator alone: requests name models, never addresses.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        info_timeout_s: float,
        rollout_timeout_s: float,
        patience_s: float,
        redis: Any = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._info_timeout_s = info_timeout_s
        self._rollout_timeout_s = rollout_timeout_s
        self._patience_s = patience_s
        self._redis = redis
        self._clients: dict[str, EngineClient] = {}

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def find(self, wanted: TeacherModel) -> common_pb2.BaseModel:
        """The model as its engine describes it.

        Raises:
            TeacherNotFound: no engine serves it, and each that was asked has answered.
            TeacherUnavailable: one did not answer, or the model was there before.
            TeacherChanged: its name now means other weights than `wanted.model_hash`.
        """
        return (await self._find(wanted))[1]

    async def generate(
        self, teacher: TeacherModel, requests: Sequence[engine_pb2.GenerateRequest]
    ) -> list[list[engine_pb2.SequenceOutput]]:
        """What the teacher's engine answers to each request. Raises as `find`, and what it refuses."""
        engine, model = await self._find(teacher)
        outputs = await draw_all(engine, requests, self._rollout_timeout_s, self._patience_s)
        # It may have been restarted on other weights while it was asked.
        if (await engine.get_info()).base_model.model_hash != model.model_hash:
            raise _changed(teacher)
        return outputs

    async def _find(self, wanted: TeacherModel) -> tuple[EngineClient, common_pb2.BaseModel]:
        engines = [self._client(address) for address in await self._known_addresses()]
        answers = await asyncio.gather(*(engine.get_info() for engine in engines), return_exceptions=True)
        models: list[tuple[EngineClient, common_pb2.BaseModel]] = []
        is_one_silent = False
        for engine, answer in zip(engines, answers, strict=True):
            if isinstance(answer, engine_pb2.EngineInfo):
                models.append((engine, answer.base_model))
            elif isinstance(answer, KilnError):
                is_one_silent = True
            else:
                raise answer
        named = [pair for pair in models if pair[1].model_id == wanted.model_id]
        for pair in named:
            if wanted.model_hash in ("", pair[1].model_hash):
                return pair
        if named:
            raise _changed(wanted)
        if is_one_silent or wanted.model_hash:
            raise TeacherUnavailable(
                f"none of the {len(models)} engines that answer, of {len(engines)}, serves {wanted.model_id!r}"
            )
        known = ", ".join(sorted({model.model_id for _, model in models})) or "none"
        raise TeacherNotFound(f"no engine serves {wanted.model_id[:160]!r}; the models there are: {known}")

    def _client(self, address: str) -> EngineClient:
        if address not in self._clients:
            self._clients[address] = EngineClient(address, timeout_s=self._info_timeout_s)
        return self._clients[address]

    async def _known_addresses(self) -> list[str]:
        """The settings' first; without Redis those alone."""
        announced: list[str] = []
        if self._redis is not None:
            try:
                announced = [word.address for word in await read_words(self._redis) if not word.is_draining]
            except (RedisError, OSError) as error:
                log.warning("teachers_not_looked_up", reason=str(error))
        return [*dict.fromkeys((*self._addresses, *announced))]


def _changed(teacher: TeacherModel) -> TeacherChanged:
    return TeacherChanged(f"{teacher.model_id!r} is no longer the model {teacher.model_hash[:12]}")
