"""POST /v1/completions/batch."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_common.errors import InvalidValue, KilnError
from kiln_common.ids import new_id
from kiln_gateway import sse
from kiln_gateway.auth import Caller, require
from kiln_gateway.chat.completion_run import CompletionRun, merge
from kiln_gateway.chat.prepare import prepare_chat
from kiln_gateway.chat.responses import ChatAnswer
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.schemas.batch import BatchBody
from kiln_gateway.together import together

router = APIRouter()
_INFER = Depends(require("infer"))


@router.post("/v1/completions/batch")
async def batch_completions(request: Request, caller: Caller = _INFER) -> Response:
    """n answers to each of many conversations, generated together; token ids and log-probabilities included."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, BatchBody)
    runs = await _prepare(gateway, body, caller)
    answers = [_answer(gateway, run, body) for run in runs]
    headers = {"X-Kiln-Adapter": ", ".join(dict.fromkeys(run.target.label for run in runs))}
    if body.stream:
        return await sse.stream(request, _events(gateway, runs, answers), headers=headers)
    whole = await sse.until_disconnect(request, _collect(gateway, runs, answers))
    return json_response(whole, headers=headers)


async def _prepare(gateway: Gateway, body: BatchBody, caller: Caller) -> list[CompletionRun]:
    num_answers = len(body.prompts) * body.num_choices
    if num_answers > gateway.settings.max_batch_choices:
        raise InvalidValue(
            f"the batch asks for {num_answers} answers, the limit is {gateway.settings.max_batch_choices}",
            param="prompts",
            hint="Send several batches.",
        )
    runs = []
    for index in range(len(body.prompts)):
        try:
            runs.append(await prepare_chat(gateway, body.chat_body(index), caller, is_one_of_many=True))
        except KilnError as error:
            if error.param in body.prompts[index].model_fields_set:
                error.param = f"prompts[{index}].{error.param}"
            raise
    return runs


def _answer(gateway: Gateway, run: CompletionRun, body: BatchBody) -> ChatAnswer:
    return ChatAnswer(
        run,
        gateway.tokenizer,
        has_logprobs=body.logprobs is not False,
        has_token_ids=body.return_token_ids is not False,
    )


async def _collect(
    gateway: Gateway, runs: Sequence[CompletionRun], answers: Sequence[ChatAnswer]
) -> dict[str, Any]:
    events = await together(run.collect(gateway.engines, gateway.rollouts, gateway.metrics) for run in runs)
    data = [
        {"prompt_index": index, **answer.whole(of_choices)}
        for index, (answer, of_choices) in enumerate(zip(answers, events, strict=True))
    ]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {
        "id": new_id("batch"),
        "object": "completion.batch",
        "created": int(time.time()),
        "model": runs[0].model,
        "data": data,
        "usage": {name: sum(entry["usage"][name] for entry in data) for name in names},
    }


async def _events(
    gateway: Gateway, runs: Sequence[CompletionRun], answers: Sequence[ChatAnswer]
) -> AsyncGenerator[bytes]:
    """The chunks of all answers as they come, each with the index of its prompt."""

    async def chunks(index: int) -> AsyncGenerator[dict[str, Any]]:
        run, answer, opened = runs[index], answers[index], set()
        async for choice, delta in run.deltas(gateway.engines, gateway.rollouts, gateway.metrics):
            if choice.index not in opened:
                opened.add(choice.index)
                yield {"prompt_index": index, **answer.opening_chunk(choice)}
            for chunk in answer.chunks(choice, delta):
                yield {"prompt_index": index, **chunk}
        yield {"prompt_index": index, **answer.usage_chunk()}

    async for chunk in merge([chunks(index) for index in range(len(runs))]):
        yield sse.frame(chunk)
    yield sse.DONE
