"""The engines behind the gateway: which of them answer, what model they serve, which one is next."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

import structlog

from kiln_common.errors import EngineUnavailable, KilnError
from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.rpc import from_error_detail
from kiln_gateway.errors import GatewayStopping
from kiln_gateway.ports import EnginePort, closing

log = structlog.get_logger()
_PROBE_INTERVAL_S = 2.0
_PROBE_TIMEOUT_S = 2.0


@dataclass
class EngineSeat:
    """One engine as the gateway sees it; only the pool changes it."""

    number: int
    client: EnginePort
    info: engine_pb2.EngineInfo | None = None
    is_answering: bool = False
    num_in_flight: int = 0


class EnginePool:
    """Routes each request to the answering engine with the fewest requests of this gateway."""

    def __init__(self, clients: Sequence[EnginePort]) -> None:
        self.seats = [EngineSeat(number, client) for number, client in enumerate(clients)]
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Probe every engine now and then while the block runs."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def probe(self) -> None:
        """Ask every engine who it is."""
        await asyncio.gather(*map(self._probe_seat, self.seats))

    async def base_model(self) -> common_pb2.BaseModel:
        """The base model the engines serve, also while they are briefly away.

        Raises:
            EngineUnavailable: no engine has answered since the gateway started.
        """
        for attempt in range(2):
            info = next((seat.info for seat in self.seats if seat.info is not None), None)
            if info is not None:
                return info.base_model
            if attempt == 0:
                await self.probe()
        raise EngineUnavailable(f"none of the {len(self.seats)} engines has answered yet")

    async def generate(
        self, request: engine_pb2.GenerateRequest
    ) -> AsyncGenerator[engine_pb2.SequenceOutput]:
        """The sequence's outputs until it ends; closing the iterator aborts it.

        Raises:
            EngineUnavailable: no engine answers, or the one at work went away.
            GatewayStopping: the pool was closed.
            KilnError: with the engine's own code when it refused or failed the request.
        """
        if self._is_closed:
            raise _stopping()
        seat = await self._choose()
        seat.num_in_flight += 1
        try:
            async with closing(seat.client.generate(request)) as outputs:
                async for output in outputs:
                    if output.finish_reason == engine_pb2.FINISH_REASON_ERROR:
                        raise from_error_detail(output.error)
                    yield output
        except EngineUnavailable:
            if self._is_closed:
                raise _stopping() from None
            seat.is_answering = False
            raise
        finally:
            seat.num_in_flight -= 1

    async def close(self) -> None:
        """End every running generation with GatewayStopping; none begins after this."""
        self._is_closed = True
        for seat in self.seats:
            await seat.client.close()

    async def _choose(self) -> EngineSeat:
        for attempt in range(2):
            answering = [seat for seat in self.seats if seat.is_answering]
            if answering:
                return min(answering, key=lambda seat: seat.num_in_flight)
            if attempt == 0:
                await self.probe()
        raise EngineUnavailable(f"none of the {len(self.seats)} engines answers")

    async def _watch(self) -> None:
        while True:
            await self.probe()
            await asyncio.sleep(_PROBE_INTERVAL_S)

    async def _probe_seat(self, seat: EngineSeat) -> None:
        try:
            info = await asyncio.wait_for(seat.client.get_info(), _PROBE_TIMEOUT_S)
        except (KilnError, TimeoutError):
            if seat.is_answering:
                log.warning("engine_away", engine=seat.number)
            seat.is_answering = False
            return
        if seat.info is None or seat.info.boot_id != info.boot_id:
            log.info("engine_found", engine=seat.number, boot_id=info.boot_id, model=info.base_model.model_id)
        seat.info, seat.is_answering = info, True


def _stopping() -> GatewayStopping:
    return GatewayStopping("the gateway is stopping, so the answer is not complete")
