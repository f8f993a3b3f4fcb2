"""The engines behind the gateway: which of them answer, what model they serve, which one is next."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Sequence

import structlog

from kiln_common.bus.engine_presence import EngineWord
from kiln_common.ending import end_tasks
from kiln_common.errors import EngineUnavailable, KilnError
from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.rpc import from_error_detail
from kiln_gateway.engine_seat import EngineSeat
from kiln_gateway.errors import GatewayStopping
from kiln_gateway.ports import EnginePort, closing
from kiln_gateway.prompt_path import prompt_path
from kiln_gateway.resumable import ResumableAnswer
from kiln_gateway.routing import choose

log = structlog.get_logger()
_PROBE_INTERVAL_S = 2.0
PROBE_TIMEOUT_S = 2.0
# Codes of engines that stop: what they have not ended is another one's.
_STOPPING = ("engine_draining", "answer_handed_back")
# A request that kills engines must not go from one to the next for ever.
_MOST_ENGINES_LOST = 3
_DEFAULT_PAGE_TOKENS = 16


class EnginePool:
    """Sends each request to an answering engine that serves the model; `routing` says to which.

    Configured engines always have a seat; others get one when they announce themselves (`connect`
    opens a client for an address), and lose it when they are gone. One that is silent for `silence_s`
    seconds has lost its requests. `on_moved` is told why whenever a request goes on elsewhere.
    """

    def __init__(
        self,
        clients: Sequence[EnginePort],
        connect: Callable[[str], EnginePort] | None = None,
        *,
        silence_s: float = 10.0,
        on_moved: Callable[[str], None] = lambda code: None,
    ) -> None:
        self.seats = [EngineSeat(number, client) for number, client in enumerate(clients)]
        self._connect = connect
        self._silence_s = silence_s
        self._on_moved = on_moved
        self._num_seated = len(self.seats)
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Probe every engine now and then while the block runs."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            await end_tasks(task)

    async def probe(self) -> None:
        """Ask every engine who it is."""
        await asyncio.gather(*map(self._probe_seat, self.seats))

    async def hear(self, words: Sequence[EngineWord]) -> None:
        """Take in what engines announce: all of them, as of now."""
        now_s = time.monotonic()
        strangers = {word.address: word for word in words}
        served = next((seat.model_hash for seat in self._known()), "")
        for seat in list(self.seats):
            mine = [word for word in words if seat.is_spoken_of(word)]
            if mine:
                # After a restart the word of the boot before may still stand.
                seat.hear(max(mine, key=seat.is_of_this_boot), now_s)
            is_gone = not mine and not seat.is_answering
            is_of_others = seat.model_hash not in ("", served)
            if not (seat.is_configured or seat.num_in_flight) and (
                is_gone or is_of_others or self._is_double(seat)
            ):
                self.seats.remove(seat)
                log.info("engine_gone", engine=seat.name, address=seat.address)
                await seat.client.close()
            for word in mine:
                strangers.pop(word.address, None)
        if self._connect is None or self._is_closed:
            return
        for address, word in strangers.items():
            if served and word.model_hash != served:
                continue  # it teaches this deployment's trainer, or is none of its business
            seat = EngineSeat(self._num_seated, self._connect(address), is_configured=False)
            self._num_seated += 1
            seat.hear(word, now_s)
            self.seats.append(seat)
            await self._probe_seat(seat)

    def _is_double(self, seat: EngineSeat) -> bool:
        """Whether a configured seat has turned out to be the same engine under another address."""
        configured = (other for other in self.seats if other.is_configured)
        return any(other.boot_id == seat.boot_id for other in configured if other.boot_id)

    async def base_model(self) -> common_pb2.BaseModel:
        """The base model the engines serve, also while they are briefly away.

        Raises:
            EngineUnavailable: no engine has answered since the gateway started.
        """
        for attempt in range(2):
            info = next((seat.info for seat in self._known()), None)
            if info is not None:
                return info.base_model
            if attempt == 0:
                await self.probe()
        raise EngineUnavailable(f"none of the {len(self.seats)} engines has answered yet")

    async def generate(
        self, request: engine_pb2.GenerateRequest
    ) -> AsyncGenerator[engine_pb2.SequenceOutput]:
        """The sequence's outputs until it ends; closing the iterator aborts it.

        An engine that stops or is gone leaves the request to another one, which goes on behind the
        last token; to the caller it is one sequence.

        Raises:
            EngineUnavailable: no engine answers, or the one at work went away and none is left.
            GatewayStopping: the pool was closed.
            KilnError: with the engine's own code when it refused or failed the request.
        """
        answer, asked = ResumableAnswer(request, time.monotonic()), request
        model_hash, tried, num_lost = "", set[str](), 0
        while True:
            seat = await self._seat_for(request, tried, model_hash)
            model_hash = seat.model_hash
            tried.add(seat.boot_id)
            try:
                async with closing(self._generate_on(seat, asked)) as outputs:
                    async for output in outputs:
                        answer.take(output)
                        yield output
                return
            except KilnError as error:
                num_lost += error.code == EngineUnavailable.code
                may_move = error.code in (*_STOPPING, EngineUnavailable.code)
                if not may_move or num_lost == _MOST_ENGINES_LOST:
                    raise
                if not await self._is_another_left(tried, model_hash):
                    raise
                asked = answer.rest(time.monotonic())
                log.info(
                    "request_moved", request=request.request_id, engine=seat.name, code=error.code,
                    tokens=answer.num_tokens,
                )  # fmt: skip
                self._on_moved(error.code)

    async def close(self) -> None:
        """End every running generation with GatewayStopping; none begins after this."""
        self._is_closed = True
        for seat in self.seats:
            await seat.client.close()

    async def _generate_on(
        self, seat: EngineSeat, request: engine_pb2.GenerateRequest
    ) -> AsyncGenerator[engine_pb2.SequenceOutput]:
        seat.num_in_flight += 1
        try:
            async with closing(seat.client.generate(request)) as outputs:
                async for output in outputs:
                    if output.finish_reason == engine_pb2.FINISH_REASON_ERROR:
                        raise from_error_detail(output.error)
                    yield output
        except KilnError as error:
            if self._is_closed:
                raise _stopping() from None
            if error.code == EngineUnavailable.code:
                seat.fell_silent(time.monotonic())
            elif error.code in _STOPPING:
                seat.is_draining = True
            raise
        finally:
            seat.num_in_flight -= 1

    async def _seat_for(
        self, request: engine_pb2.GenerateRequest, tried: Container[str], model_hash: str
    ) -> EngineSeat:
        if self._is_closed:
            raise _stopping()
        seats = self._usable(tried, model_hash)
        if not seats:
            await self.probe()
            seats = self._usable(tried, model_hash)
        if not seats:
            raise EngineUnavailable(f"none of the {len(self.seats)} engines answers")
        if len(seats) == 1:
            return seats[0]
        now_s = time.monotonic()
        path = prompt_path(request, _page_tokens(seats[0]))
        adapters = [use.sha256 for use in request.adapters]
        seat = seats[choose([seat.view(adapters, now_s) for seat in seats], path.names, path.key)]
        seat.place(path.kept, now_s)
        return seat

    def _usable(self, tried: Container[str], model_hash: str) -> list[EngineSeat]:
        """Answering engines of the model, each once, without those that are stopping if others are there.

        Boots in `tried` are left out; an engine that was started again since is another one. Without a
        `model_hash` it is the model of the first.
        """
        by_boot: dict[str, EngineSeat] = {}
        for seat in self.seats:
            if seat.is_answering and seat.info is not None:
                by_boot.setdefault(seat.boot_id, seat)
        model_hash = model_hash or self._served_hash()
        seats = [s for s in by_boot.values() if s.model_hash == model_hash and s.boot_id not in tried]
        return [seat for seat in seats if not seat.is_draining] or seats

    def _served_hash(self) -> str:
        """Not that of an engine that announced itself, which may serve another model for a trainer."""
        known = self._known()
        answering = (seat.model_hash for seat in known if seat.is_answering)
        return next(answering, known[0].model_hash if known else "")

    def _known(self) -> list[EngineSeat]:
        """Seats that have answered once: the configured ones, the others only where none of those has."""
        known = [seat for seat in self.seats if seat.info is not None]
        return [seat for seat in known if seat.is_configured] or known

    async def _is_another_left(self, tried: Container[str], model_hash: str) -> bool:
        if not self._usable(tried, model_hash) and len(self.seats) > 1:
            await self.probe()  # it may have been too busy to say so
        return bool(self._usable(tried, model_hash))

    async def _watch(self) -> None:
        while True:
            await self.probe()
            await asyncio.sleep(_PROBE_INTERVAL_S)

    async def _probe_seat(self, seat: EngineSeat) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                info = await seat.client.get_info()
        except (KilnError, TimeoutError):
            if seat.is_answering:
                log.warning("engine_away", engine=seat.name, address=seat.address)
            now_s = time.monotonic()
            seat.fell_silent(now_s)
            if seat.is_given_up(now_s, self._silence_s):
                seat.client.end_session("the engine has been silent for too long")
            return
        if seat.answered(info):
            log.info("engine_found", engine=seat.name, boot_id=info.boot_id, model=info.base_model.model_id)


def _page_tokens(seat: EngineSeat) -> int:
    announced = seat.word.page_tokens if seat.word is not None else 0
    return announced or (seat.info.page_tokens if seat.info is not None else 0) or _DEFAULT_PAGE_TOKENS


def _stopping() -> GatewayStopping:
    return GatewayStopping("the gateway is stopping, so the answer is not complete")
