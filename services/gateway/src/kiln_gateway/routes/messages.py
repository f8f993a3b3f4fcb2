"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_gateway import sse
from kiln_gateway.auth import Caller, require
from kiln_gateway.chat.completion_run import CompletionRun
from kiln_gateway.chat.prepare import chat_prompt, prepare_chat, resolve_target
from kiln_gateway.chat.translated import complaints_about
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.http_errors import request_id_of
from kiln_gateway.json_response import json_response
from kiln_gateway.messages_api.answer import MessageAnswer
from kiln_gateway.messages_api.request import SOURCES, to_chat
from kiln_gateway.schemas.messages import CountTokensBody, MessagesBody

router = APIRouter()
_INFER = Depends(require("infer"))


@router.post("/v1/messages")
async def messages(request: Request, caller: Caller = _INFER) -> Response:
    """An answer in Anthropic's shape, whole or as a stream."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, MessagesBody)
    with complaints_about(SOURCES):
        run = await prepare_chat(gateway, to_chat(body), caller, id_prefix="msg")
    answer = MessageAnswer(run, body)
    headers = {"X-Kiln-Adapter": run.target.label, "request-id": request_id_of(request)}
    if body.stream:
        return await sse.stream(request, _events(gateway, run, answer), headers=headers)
    await sse.until_disconnect(request, _collect(gateway, run, answer))
    return json_response(answer.whole(), headers=headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, caller: Caller = _INFER) -> Response:
    """How many tokens the prompt of such a request has."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, CountTokensBody)
    with complaints_about(SOURCES):
        chat = to_chat(body)
        await resolve_target(gateway, chat, caller)
        prompt = await chat_prompt(gateway, chat)
    return json_response({"input_tokens": len(prompt.token_ids)})


async def _collect(gateway: Gateway, run: CompletionRun, answer: MessageAnswer) -> None:
    async for _ in _events(gateway, run, answer):
        pass


async def _events(gateway: Gateway, run: CompletionRun, answer: MessageAnswer) -> AsyncGenerator[bytes]:
    with complaints_about(SOURCES):
        async for _, delta in run.deltas(gateway.engines, gateway.rollouts, gateway.metrics):
            for event in answer.push(delta):
                yield sse.frame(event, event=event["type"])
