"""POST /v1/responses, and the responses it kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_gateway import sse
from kiln_gateway.auth import Caller, require
from kiln_gateway.chat.completion_run import CompletionRun
from kiln_gateway.chat.prepare import prepare_chat
from kiln_gateway.chat.translated import complaints_about
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.responses_api.answer import ResponseAnswer
from kiln_gateway.responses_api.request import SOURCES, Messages, input_messages, to_chat
from kiln_gateway.responses_api.store import KeptResponse
from kiln_gateway.schemas.responses import ResponsesBody

router = APIRouter()
_INFER = Depends(require("infer"))


@router.post("/v1/responses")
async def create_response(request: Request, caller: Caller = _INFER) -> Response:
    """An answer as a row of output items, whole or as a stream; kept, so that a conversation goes on from it."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, ResponsesBody)
    history: Messages = []
    if body.previous_response_id is not None:
        param = "previous_response_id"
        kept = await gateway.responses.find(body.previous_response_id, caller.owner, param=param)
        history = kept.messages
    with complaints_about(SOURCES):
        run = await prepare_chat(gateway, to_chat(body, history), caller, id_prefix="resp")
    answer = ResponseAnswer(run, body)
    conversation = [*history, *input_messages(body.input)] if run.keeps_rollouts else None
    headers = {"X-Kiln-Adapter": run.target.label}
    if body.stream:
        events = _events(gateway, run, answer, conversation)
        return await sse.stream(request, events, headers=headers)
    await sse.until_disconnect(request, _collect(gateway, run, answer, conversation))
    return json_response(answer.whole(), headers=headers)


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request, response_id: str, caller: Caller = _INFER) -> Response:
    """A response that was kept."""
    kept = await gateway_of(request).responses.find(response_id, caller.owner)
    return json_response(kept.response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str, caller: Caller = _INFER) -> Response:
    """Forget a response before its time."""
    await gateway_of(request).responses.delete(response_id, caller.owner)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def _collect(
    gateway: Gateway, run: CompletionRun, answer: ResponseAnswer, conversation: Messages | None
) -> None:
    async for _ in _events(gateway, run, answer, conversation):
        pass


async def _events(
    gateway: Gateway, run: CompletionRun, answer: ResponseAnswer, conversation: Messages | None
) -> AsyncGenerator[bytes]:
    with complaints_about(SOURCES):
        async for _, delta in run.deltas(gateway.engines, gateway.rollouts, gateway.metrics):
            for event in answer.push(delta):
                yield sse.frame(event, event=event["type"])
    if conversation is not None:
        kept = KeptResponse(run.owner, [*conversation, answer.message()], answer.whole())
        await gateway.responses.save(run.completion_id, kept)
    ending = answer.ending()
    yield sse.frame(ending, event=ending["type"])
