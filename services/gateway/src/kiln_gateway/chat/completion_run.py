"""A whole completion request under way: its choices run side by side and end as kept rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from kiln_common import tracing
from kiln_common.errors import EngineUnavailable, KilnError
from kiln_common.pb import engine_pb2
from kiln_common.text.tool_calls import ToolEvent
from kiln_gateway.chat.choice import ChoiceAssembler, ChoiceDelta
from kiln_gateway.chat.choice_trace import choice_trace
from kiln_gateway.chat.sampling import record_of
from kiln_gateway.engine_pool import EnginePool
from kiln_gateway.insight.live_requests import RequestTrace
from kiln_gateway.metrics import GatewayMetrics
from kiln_gateway.model_resolver import Target
from kiln_gateway.rollouts import Rollout, RolloutStore

Item = TypeVar("Item")


@dataclass(frozen=True)
class Choice:
    """One sequence to generate."""

    index: int
    request: engine_pb2.GenerateRequest
    assembler: ChoiceAssembler


@dataclass(frozen=True)
class Usage:
    """Token counts of a finished request; prompts of several choices count once each."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    num_reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `start` to `end` of a choice and the adapters that drew them."""

    start: int
    end: int
    adapter: str


@dataclass(frozen=True)
class CompletionRun:
    """Generates every choice of one request.

    `match_key` gives the match key of a choice's content, or is None where none applies.
    `keeps_rollouts` is the request's `store`.
    """

    completion_id: str
    model: str
    target: Target
    model_hash: str
    owner: str
    choices: Sequence[Choice]
    keeps_rollouts: bool
    match_key: Callable[[str], str] | None
    num_prompts: int
    follows_latest: bool = False
    # Told how many tokens were used, prompts too, once nothing runs any more.
    charge: Callable[[int], None] = lambda num_tokens: None
    # The request's field that the engine's complaints about its grammar belong to.
    grammar_field: str = ""
    created_at_s: int = field(default_factory=lambda: int(time.time()))

    async def deltas(
        self, engines: EnginePool, rollouts: RolloutStore, metrics: GatewayMetrics
    ) -> AsyncGenerator[tuple[Choice, ChoiceDelta]]:
        """Every choice's deltas as they come; a choice's last one comes after its rollout was kept.

        Closing the iterator aborts what still runs.
        """
        streams = [self._run(choice, engines, rollouts, metrics) for choice in self.choices]
        merged = streams[0] if len(streams) == 1 else merge(streams)
        try:
            async with contextlib.aclosing(merged) as deltas:
                async for item in deltas:
                    yield item
        finally:
            if any(choice.assembler.tokens or choice.assembler.is_finished for choice in self.choices):
                usage = self.usage()
                self.charge(usage.num_prompt_tokens + usage.num_completion_tokens)

    async def collect(
        self, engines: EnginePool, rollouts: RolloutStore, metrics: GatewayMetrics
    ) -> dict[int, list[ToolEvent]]:
        """Run every choice to its end; returns the events of each by its index."""
        events: dict[int, list[ToolEvent]] = {choice.index: [] for choice in self.choices}
        async for choice, delta in self.deltas(engines, rollouts, metrics):
            events[choice.index] += delta.events
        return events

    def usage(self) -> Usage:
        """Counts so far."""
        num_per_prompt = len(self.choices) // self.num_prompts
        firsts = self.choices[::num_per_prompt]
        return Usage(
            num_prompt_tokens=sum(len(choice.request.prompt_token_ids) for choice in firsts),
            num_cached_tokens=sum(choice.assembler.num_cached_tokens for choice in firsts),
            num_completion_tokens=sum(len(choice.assembler.tokens) for choice in self.choices),
            num_reasoning_tokens=sum(choice.assembler.num_reasoning_tokens for choice in self.choices),
        )

    def version_spans(self, choice: Choice) -> list[VersionSpan]:
        """Which versions drew which of the choice's tokens so far, in order and without gaps."""
        num_tokens = len(choice.assembler.tokens)
        starts = [(0, self.target.label), *choice.assembler.moves]
        ends = [start for start, _ in starts[1:]] + [num_tokens]
        pairs = zip(starts, ends, strict=True)
        return [VersionSpan(start, end, adapter) for (start, adapter), end in pairs if start < end]

    async def _run(
        self, choice: Choice, engines: EnginePool, rollouts: RolloutStore, metrics: GatewayMetrics
    ) -> AsyncGenerator[tuple[Choice, ChoiceDelta]]:
        assembler = choice.assembler
        started_s = arrived_s = time.monotonic()
        with (
            metrics.running_choices.track_inprogress(),
            self._following(choice, metrics) as seen,
            choice_trace(choice.request, assembler) as trace,
        ):
            push = assembler.push if trace is None else trace.push
            async with contextlib.aclosing(self._outputs(choice, engines)) as outputs:
                async for output in outputs:
                    is_first = not assembler.tokens
                    last_s, arrived_s = arrived_s, time.monotonic()
                    delta = push(output)
                    metrics.live.took(
                        seen,
                        len(delta.tokens),
                        queue_s=output.queue_s,
                        num_cached_tokens=output.num_cached_tokens,
                    )
                    if not is_first:
                        metrics.times.between_tokens_s.observe(arrived_s - last_s)
                    elif assembler.tokens:
                        metrics.times.first_token_s.observe(arrived_s - started_s)
                        metrics.times.queue_s.observe(output.queue_s)
                    if delta.finish_reason is None:
                        if delta.tokens:  # there are none while a prompt is read out
                            yield choice, delta
                        continue
                    break
                else:
                    raise EngineUnavailable("the engine ended the sequence without a reason")
            metrics.times.choice_s.observe(arrived_s - started_s)
            seen.end = assembler.finish_reason or ""
            metrics.prompt_tokens.inc(len(choice.request.prompt_token_ids))
            metrics.completion_tokens.inc(len(assembler.tokens))
            if self.keeps_rollouts and assembler.tokens:
                with tracing.span("rollout.save", parent=trace.traceparent if trace else ""):
                    is_kept = await rollouts.save(self._rollout(choice))
                metrics.rollouts.labels("kept" if is_kept else "lost").inc()
        yield choice, delta

    def _following(
        self, choice: Choice, metrics: GatewayMetrics
    ) -> contextlib.AbstractContextManager[RequestTrace]:
        num_prompt_tokens = len(choice.request.prompt_token_ids)
        return metrics.live.following(
            self.completion_id, choice.index, self.owner, self.target.label, num_prompt_tokens
        )

    async def _outputs(
        self, choice: Choice, engines: EnginePool
    ) -> AsyncGenerator[engine_pb2.SequenceOutput]:
        try:
            async with contextlib.aclosing(engines.generate(choice.request)) as outputs:
                async for output in outputs:
                    yield output
        except KilnError as error:
            if error.param == "grammar":
                error.param = self.grammar_field
            raise

    def _rollout(self, choice: Choice) -> Rollout:
        assembler = choice.assembler
        return Rollout(
            completion_id=self.completion_id,
            index=choice.index,
            owner=self.owner,
            prompt_token_ids=list(choice.request.prompt_token_ids),
            completion_token_ids=[token.token_id for token in assembler.tokens],
            logprobs=[token.logprob for token in assembler.tokens],
            sampled_logprobs=[token.sampled_logprob for token in assembler.tokens],
            sampling=record_of(choice.request, assembler.seed),
            adapter_version=",".join(dict.fromkeys(span.adapter for span in self.version_spans(choice)))
            or self.target.label,
            version_spans=[asdict(span) for span in self.version_spans(choice)] if assembler.moves else [],
            finish_reason=assembler.finish_reason or "",
            model_hash=self.model_hash,
            match_key=self.match_key(assembler.content) if self.match_key is not None else "",
        )


async def merge(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """Items of all streams as they come; the first error ends it and closes the others."""
    queue: asyncio.Queue[Item | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Item]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
        except Exception as error:  # noqa: BLE001 raised again by the reader
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
