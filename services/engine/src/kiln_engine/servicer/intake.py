"""Every request between its arrival and its last event, whatever it waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from kiln_common.errors import DeadlineExceeded, DuplicateRequestId, KilnError
from kiln_common.pb import engine_pb2
from kiln_engine.domain.adapter import AdapterVersion
from kiln_engine.domain.errors import (
    AdapterUnavailable,
    AnswerHandedBack,
    EngineDraining,
    GrammarsUnavailable,
)
from kiln_engine.domain.output_rules import OutputRules
from kiln_engine.domain.ports import AdapterResidency, Clock, GrammarCompiler
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.domain.result import FinishReason, SequenceEvent
from kiln_engine.loop import EngineLoop
from kiln_engine.mailbox import Sink
from kiln_engine.servicer.followers import Followers, LiveRequest
from kiln_engine.servicer.validation import (
    RequestLimits,
    parse_adapter_version,
    parse_request,
    parse_thinking,
)

log = structlog.get_logger()

# An abort takes effect when the step that runs has ended.
_ABORT_WAIT_S = 5.0


@dataclass
class RequestIntake:
    """Accepts requests, brings their grammars and adapters, hands them to the loop, and sees each end once.

    Lives on the asyncio thread; `ended` is the one method for the loop's thread.
    """

    loop: EngineLoop
    adapters: AdapterResidency
    limits: RequestLimits
    clock: Clock
    grammars: GrammarCompiler | None = None
    is_draining: bool = False
    on_draining: Callable[[], None] = lambda: None
    _live: dict[str, LiveRequest] = field(default_factory=dict)
    _num_handed_back: int = 0
    _is_empty: asyncio.Event = field(default_factory=asyncio.Event)
    followers: Followers = field(init=False)
    _asyncio_loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def __post_init__(self) -> None:
        self.followers = Followers(self.loop, self.adapters)

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_preparing(self) -> int:
        """Requests that wait for a grammar or an adapter."""
        return sum(live.preparing is not None for live in self._live.values())

    def submit(self, message: engine_pb2.GenerateRequest, sink: Sink, owner: str | None = None) -> None:
        """Accept a request; everything further about it, its end included, goes to the sink.

        `owner`: whose adapters it may use; None is anyone's.

        Raises:
            KilnError: it was not accepted; the sink hears nothing.
        """
        if self.is_draining:
            raise EngineDraining("the engine is being stopped and takes no new requests")
        request = parse_request(message, self.limits, self.clock.now())
        if request.request_id in self._live:
            raise DuplicateRequestId(request.request_id)
        live = LiveRequest(sink)
        if message.HasField("thinking"):
            request = replace(request, rules=OutputRules(thinking=parse_thinking(message.thinking)))
        if request.adapters or message.HasField("grammar"):
            versions = [parse_adapter_version(adapter) for adapter in message.adapters]
            if versions and message.adapter_policy == engine_pb2.ADAPTER_POLICY_LATEST:
                live.followed_scales = tuple(use.scale for use in request.adapters)
            grammar = message.grammar if message.HasField("grammar") else None
            live.preparing = asyncio.create_task(
                self._prepare_then_submit(request, grammar, versions, live, owner)
            )
        else:
            self.loop.submit(request, (), sink)
        self._live[request.request_id] = live

    def follow(self, version: AdapterVersion) -> None:
        """A version can serve: requests that follow its name go on with it."""
        if any(live.followed_scales for live in self._live.values()):
            self.followers.move_later(self._live)

    def abort(self, request_id: str, sink: Sink, error: KilnError | None = None) -> None:
        """End a request of that sink, with `error` if given; others and unknown ids are ignored."""
        live = self._live.get(request_id)
        if live is None or live.sink is not sink:
            return
        if live.preparing is None:
            self.loop.abort(request_id, error)
        else:
            live.preparing.cancel()
            reason = FinishReason.ABORT if error is None else FinishReason.ERROR
            sink.offer([SequenceEvent(request_id, finish_reason=reason, error=error)])
            self._forget(request_id)

    def abort_all(self, sink: Sink | None = None, error: KilnError | None = None) -> int:
        """End every request, or those of one sink; returns how many."""
        chosen = [(i, live.sink) for i, live in self._live.items() if sink is None or live.sink is sink]
        for request_id, owner in chosen:
            self.abort(request_id, owner, error)
        return len(chosen)

    async def drain(self, deadline_s: float) -> tuple[int, int]:
        """Take no new requests, let the live ones end, and after `deadline_s` seconds hand back the rest.

        A gateway has another engine go on behind the last token it was sent. Called again, with less
        time, it hands back sooner.

        Returns how many ended by themselves and how many were handed back.
        """
        self.is_draining = True
        self.on_draining()
        num_before, num_returned_before = self.num_live, self._num_handed_back
        if num_before:
            self._is_empty.clear()
            try:
                await asyncio.wait_for(self._is_empty.wait(), deadline_s)
            except TimeoutError:
                self._num_handed_back += self.abort_all(
                    error=AnswerHandedBack("the engine stopped before the end")
                )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_empty.wait(), _ABORT_WAIT_S)
        num_handed_back = self._num_handed_back - num_returned_before
        return num_before - num_handed_back, num_handed_back

    def ended(self, request_ids: list[str]) -> None:
        """The loop is done with these requests. Called on the loop's thread."""
        if not self._asyncio_loop.is_closed():
            self._asyncio_loop.call_soon_threadsafe(self._forget_all, request_ids)

    async def _prepare_then_submit(
        self,
        request: GenerationRequest,
        grammar: engine_pb2.Grammar | None,
        versions: list[AdapterVersion],
        live: LiveRequest,
        owner: str | None,
    ) -> None:
        patience_s = None if request.deadline_s is None else request.deadline_s - self.clock.now()
        try:
            async with asyncio.timeout(patience_s):
                if grammar is not None:
                    request = await self._with_grammar(request, grammar)
                if owner is not None:
                    await self.adapters.check_owner(versions, owner)
                if versions:
                    live.lease = await self.adapters.acquire(versions)
            live.preparing = None
            slots = zip(live.lease.slots if live.lease else (), request.adapters, strict=True)
            self.loop.submit(request, tuple((slot, use.scale) for slot, use in slots), live.sink)
            if self.followers.is_behind(live):  # what came while it waited
                self.followers.move_later(self._live)
        except TimeoutError:
            late = DeadlineExceeded("grammar and adapters were not there before the request's deadline")
            self._refuse(request.request_id, live.sink, late)
        except KilnError as error:
            self._refuse(request.request_id, live.sink, error)
        except Exception as error:  # such as a device without memory: the request must end all the same
            log.error("request_not_prepared", request=request.request_id, exc_info=error)
            failure = AdapterUnavailable("the adapter could not be brought to the device")
            self._refuse(request.request_id, live.sink, failure)

    async def _with_grammar(
        self, request: GenerationRequest, grammar: engine_pb2.Grammar
    ) -> GenerationRequest:
        if self.grammars is None:
            raise GrammarsUnavailable("the engine has no tokenizer to read grammars with")
        language = grammar.WhichOneof("language")
        assert language is not None
        compiled = await self.grammars.compile(language, getattr(grammar, language))
        rules = replace(
            request.rules or OutputRules(),
            grammar=compiled,
            trigger_token_id=grammar.trigger_token_id if grammar.HasField("trigger_token_id") else None,
        )
        return replace(request, rules=rules)

    def _refuse(self, request_id: str, sink: Sink, error: KilnError) -> None:
        sink.offer([SequenceEvent(request_id, finish_reason=FinishReason.ERROR, error=error)])
        self._forget(request_id)

    def _forget_all(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        live = self._live.pop(request_id, None)
        if live is not None and live.lease is not None:
            self.adapters.release(live.lease)
        if not self._live:
            self._is_empty.set()
