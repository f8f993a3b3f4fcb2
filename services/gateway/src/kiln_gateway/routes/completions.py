"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_gateway import sse
from kiln_gateway.auth import Caller, require
from kiln_gateway.chat.completion_run import CompletionRun
from kiln_gateway.chat.prepare import prepare_chat, prepare_text
from kiln_gateway.chat.responses import ChatAnswer
from kiln_gateway.chat.text_answer import TextAnswer
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.schemas.chat import ChatCompletionBody
from kiln_gateway.schemas.completions import TextCompletionBody
from kiln_gateway.schemas.sampling import CompletionFields

router = APIRouter()
_INFER = Depends(require("infer"))


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, caller: Caller = _INFER) -> Response:
    """One answer to a conversation, or n of them, whole or as a stream."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, ChatCompletionBody)
    run = await prepare_chat(gateway, body, caller)
    answer = ChatAnswer(
        run,
        gateway.tokenizer,
        has_logprobs=bool(body.logprobs),
        has_token_ids=bool(body.return_token_ids),
        includes_usage=_includes_usage(body),
    )
    headers = {"X-Kiln-Adapter": run.target.label}
    if body.stream:
        return await sse.stream(request, _events(gateway, run, answer, body), headers=headers)
    events = await sse.until_disconnect(
        request, run.collect(gateway.engines, gateway.rollouts, gateway.metrics)
    )
    return json_response(answer.whole(events), headers=headers)


@router.post("/v1/completions")
async def text_completions(request: Request, caller: Caller = _INFER) -> Response:
    """Continuations of one or several prompts, n of each, whole or as a stream."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, TextCompletionBody)
    run = await prepare_text(gateway, body, caller)
    answer = TextAnswer(run, gateway.tokenizer, body, includes_usage=_includes_usage(body))
    headers = {"X-Kiln-Adapter": run.target.label}
    if body.stream:
        return await sse.stream(request, _events(gateway, run, answer, body), headers=headers)
    await sse.until_disconnect(request, run.collect(gateway.engines, gateway.rollouts, gateway.metrics))
    return json_response(answer.whole(), headers=headers)


def _includes_usage(body: CompletionFields) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


async def _events(
    gateway: Gateway, run: CompletionRun, answer: ChatAnswer | TextAnswer, body: CompletionFields
) -> AsyncGenerator[bytes]:
    opened: set[int] = set()
    async for choice, delta in run.deltas(gateway.engines, gateway.rollouts, gateway.metrics):
        if choice.index not in opened:
            opened.add(choice.index)
            if (opening := answer.opening_chunk(choice)) is not None:
                yield sse.frame(opening)
        for chunk in answer.chunks(choice, delta):
            yield sse.frame(chunk)
    if _includes_usage(body):
        yield sse.frame(answer.usage_chunk())
    yield sse.DONE
