"""The registry and the engines, as the worker thread calls them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog
from redis.exceptions import RedisError

from kiln_common.bus.engine_presence import read_words
from kiln_common.clients.engine import EngineClient
from kiln_common.clients.evaluations import EvaluationsClient
from kiln_common.clients.registry import RegistryClient
from kiln_common.errors import AdapterNotFound, ErrorKind, KilnError
from kiln_common.pb import common_pb2, engine_pb2, evaluations_pb2, registry_pb2
from kiln_trainer.completions import draw_all
from kiln_trainer.domain.training import AdapterContent, StartingPoint
from kiln_trainer.jobs.ports import Audience, LiveReport
from kiln_trainer.recipes.opd_options import TeacherModel
from kiln_trainer.teachers import TeacherDirectory

log = structlog.get_logger()
T = TypeVar("T")

_RETRY_S = 0.2
_CHECK_S = 0.25


class EngineDirectory:
    """The configured engines, and those that announce themselves on Redis; used on the event loop.

    The first configured one is the engine whose weights are mapped.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        info_timeout_s: float,
        live_timeout_s: float,
        rollout_timeout_s: float = 600.0,
        patience_s: float = 300.0,
        redis: Any = None,
    ) -> None:
        self._connect = lambda address: EngineClient(address, timeout_s=info_timeout_s)
        self._engines = [self._connect(address) for address in addresses]
        self._redis = redis
        self._announced: dict[str, EngineClient] = {}
        self._live_timeout_s = live_timeout_s
        self._rollout_timeout_s = rollout_timeout_s
        self._patience_s = patience_s
        self._info: engine_pb2.EngineInfo | None = None
        self._info_read_s = -math.inf

    async def close(self) -> None:
        for engine in (*self._engines, *self._announced.values()):
            await engine.close()

    async def info(self, max_age_s: float = 5.0) -> engine_pb2.EngineInfo | None:
        """What the first engine that answers says; the last known answer, else None, when none does."""
        if time.monotonic() - self._info_read_s < max_age_s:
            return self._info
        for engine in self._engines:
            try:
                self._info = await engine.get_info()
            except KilnError:
                continue
            self._info_read_s = time.monotonic()
            break
        return self._info

    async def _ask(
        self, call: Callable[[EngineClient], Coroutine[Any, Any, T]], audience: Audience
    ) -> list[tuple[EngineClient, T]]:
        """What each wanted engine answers; the configured ones are asked while the others are looked for."""
        if audience != "all":
            return await _answers(self._engines[:1], call)

        async def ask_announced() -> list[tuple[EngineClient, T]]:
            await self._look_around()
            return await _answers([*self._announced.values()], call)

        configured, announced = await asyncio.gather(_answers(self._engines, call), ask_announced())
        return configured + announced

    async def _look_around(self) -> None:
        """Find the engines of this model that are not configured; without Redis those known remain."""
        if self._redis is None:
            return
        try:
            words = await read_words(self._redis)
        except (RedisError, OSError) as error:
            log.warning("engines_not_looked_up", reason=str(error))
            return
        answers = await asyncio.gather(
            *(engine.get_info() for engine in self._engines), return_exceptions=True
        )
        infos = [answer for answer in answers if not isinstance(answer, BaseException)]
        boot_ids = {info.boot_id for info in infos}
        model_hashes = {info.base_model.model_hash for info in infos} or {word.model_hash for word in words}
        configured = {engine.address for engine in self._engines}
        found = {
            word.address
            for word in words
            if word.boot_id not in boot_ids
            and word.address not in configured
            and word.model_hash in model_hashes
            and not word.is_draining
        }
        for address in self._announced.keys() - found:
            await self._announced.pop(address).close()
        for address in found - self._announced.keys():
            self._announced[address] = self._connect(address)

    async def hand_over(self, name: str, content: AdapterContent, audience: Audience) -> dict[str, str]:
        """Give the bytes to the engines of this host; returns by address the sha256 of what they took.

        The others, and those that do not take them, fetch them from the registry later.
        """
        answers = await self._ask(lambda engine: self._hand_to(engine, name, content), audience)
        return {engine.address: sha256 for engine, sha256 in answers if sha256}

    async def _hand_to(self, engine: EngineClient, name: str, content: AdapterContent) -> str:
        try:
            socket_path = (await engine.get_info()).adapter_socket_path
            if not socket_path or not os.path.exists(socket_path):
                return ""
            return await asyncio.to_thread(content.hand_over, socket_path, name, self._live_timeout_s)
        except Exception as error:  # noqa: BLE001 whatever it is, the registry has the bytes too
            log.warning("adapter_not_handed_over", engine=engine.address, reason=str(error))
            return ""

    async def prepare(self, adapter: common_pb2.AdapterRef, audience: Audience) -> tuple[str, ...]:
        """Have the engines load the version; returns those that do not serve it.

        They are named by boot id, or by address where they are away.
        An engine that is away is asked again for `live_timeout_s` seconds.
        """
        answers = await self._ask(lambda engine: self._prepare_on(engine, adapter), audience)
        return tuple(name for _, name in answers if name is not None)

    async def generate(
        self, requests: Sequence[engine_pb2.GenerateRequest]
    ) -> list[list[engine_pb2.SequenceOutput]]:
        """What the engine whose weights are mapped answers to each request."""
        return await draw_all(self._engines[0], requests, self._rollout_timeout_s, self._patience_s)

    async def _prepare_on(self, engine: EngineClient, adapter: common_pb2.AdapterRef) -> str | None:
        deadline_s = time.monotonic() + self._live_timeout_s
        while True:
            try:
                await engine.prepare_adapter(adapter, timeout_s=max(0.1, deadline_s - time.monotonic()))
            except KilnError as error:
                is_final = error.kind is not ErrorKind.UNAVAILABLE
                if is_final or time.monotonic() + _RETRY_S > deadline_s:
                    log.warning("adapter_not_live", engine=engine.address, code=error.code, reason=str(error))
                    return await _name(engine)
                await asyncio.sleep(_RETRY_S)
            else:
                return None


async def _answers(
    engines: Sequence[EngineClient], call: Callable[[EngineClient], Coroutine[Any, Any, T]]
) -> list[tuple[EngineClient, T]]:
    return list(zip(engines, await asyncio.gather(*map(call, engines)), strict=True))


async def _name(engine: EngineClient) -> str:
    """The boot id of an engine that answers, else its address."""
    try:
        return (await engine.get_info()).boot_id
    except KilnError:
        return engine.address


class GrpcPublisher:
    """A Publisher for a worker thread: its calls run on the event loop that owns the channels."""

    def __init__(
        self,
        registry: RegistryClient,
        engines: EngineDirectory,
        loop: asyncio.AbstractEventLoop,
        evaluations: EvaluationsClient | None = None,
        teachers: TeacherDirectory | None = None,
    ) -> None:
        self._registry = registry
        self._engines = engines
        self._teachers = teachers
        self._loop = loop
        self._evaluations = evaluations
        # Begun with the last content that was to be published, and kept when the registry is asked again.
        self._handover: tuple[AdapterContent, asyncio.Task[dict[str, str]]] | None = None
        # Begun with the last version that was published: engines take it over at once.
        self._going_live: asyncio.Task[LiveReport] | None = None
        # Hash and bytes of that version: the next job of its adapter starts from them.
        self._last_published: tuple[str, memoryview] | None = None

    def resolve(self, reference: str) -> registry_pb2.AdapterVersion:
        return self._on_loop(self._registry.resolve(reference))

    def download(self, version: registry_pb2.AdapterVersion, folder: Path) -> StartingPoint:
        known_sha256, content = self._last_published or ("", memoryview(b""))
        if known_sha256 != version.sha256:
            content = memoryview(self._on_loop(self._registry.fetch(version.sha256)))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "adapter_model.safetensors"
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        os.replace(partial, path)
        return StartingPoint(f"{version.name}@{version.version}", version.config_json, path)

    def publish(
        self, header: registry_pb2.PublishHeader, content: AdapterContent, audience: Audience = "all"
    ) -> registry_pb2.AdapterVersion:
        return self._on_loop(self._publish(header, content, audience))

    async def _publish(
        self, header: registry_pb2.PublishHeader, content: AdapterContent, audience: Audience
    ) -> registry_pb2.AdapterVersion:
        if self._handover is None or self._handover[0] is not content:
            handing = self._engines.hand_over(header.name, content, audience)
            self._handover = content, asyncio.create_task(handing)
        handover = self._handover[1]
        version = await self._registry.publish(header, content.view())
        self._going_live = asyncio.create_task(self._go_live(version, handover, content.view(), audience))
        return version

    async def _go_live(
        self,
        version: registry_pb2.AdapterVersion,
        handover: asyncio.Task[dict[str, str]],
        content: memoryview,
        audience: Audience,
    ) -> LiveReport:
        """Have its engines serve a version that was just committed."""
        began_s = time.monotonic()
        for engine, sha256 in (await handover).items():
            if sha256 == version.sha256:
                self._last_published = sha256, content
            else:  # it will fetch the right ones
                log.error("handed_adapter_differs", engine=engine, sha256=sha256, published=version.sha256)
        adapter = common_pb2.AdapterRef(name=version.name, version=version.version, sha256=version.sha256)
        not_live = await self._engines.prepare(adapter, audience)
        return LiveReport(not_live, time.monotonic() - began_s)

    def max_adapter_rank(self) -> int:
        info = self._on_loop(self._engines.info())
        return info.max_adapter_rank if info is not None else 0

    def make_live(self, version: registry_pb2.AdapterVersion) -> LiveReport:
        return self._on_loop(self._until_live())

    async def _until_live(self) -> LiveReport:
        assert self._going_live is not None, "nothing was published"
        return await self._going_live

    def generate(
        self,
        requests: Sequence[engine_pb2.GenerateRequest],
        check: Callable[[], None],
        teacher: TeacherModel | None = None,
    ) -> list[list[engine_pb2.SequenceOutput]]:
        if teacher is None:
            generating = self._engines.generate(requests)
        else:
            assert self._teachers is not None, "this publisher was made without teachers"
            generating = self._teachers.generate(teacher, requests)
        future = asyncio.run_coroutine_threadsafe(generating, self._loop)
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=_CHECK_S)
                check()
            return future.result()
        finally:
            future.cancel()

    def start_evaluation(self, request: evaluations_pb2.SubmitRunRequest) -> evaluations_pb2.EvalRun:
        assert self._evaluations is not None, "this publisher was made without evaluations"
        return self._on_loop(self._evaluations.submit_run(request))

    def evaluation(self, run_id: str, owner: str) -> evaluations_pb2.EvalRun:
        assert self._evaluations is not None, "this publisher was made without evaluations"
        return self._on_loop(self._evaluations.get_run(run_id, owner))

    def withdraw(self, name: str, version: int = 0) -> None:
        try:
            self._on_loop(self._registry.delete(name, version, actor="trainer"))
        except KilnError as error:
            if error.code != AdapterNotFound.code:
                raise

    def versions(self, name: str) -> Sequence[registry_pb2.AdapterVersion]:
        try:
            return self._on_loop(self._registry.get(name)).versions
        except KilnError as error:
            if error.code != AdapterNotFound.code:
                raise
            return ()

    def default_adapter(self) -> str:
        attached = self._on_loop(self._registry.get_default())
        return f"{attached.name}@{attached.version}" if attached is not None else ""

    def attach(self, reference: str) -> None:
        self._on_loop(self._registry.set_default(reference, actor="trainer"))

    def _on_loop(self, call: Coroutine[Any, Any, T]) -> T:
        """Every call has its own deadline, so this always returns."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()
