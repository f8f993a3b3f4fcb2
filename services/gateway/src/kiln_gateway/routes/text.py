"""POST /v1/tokenize and /v1/detokenize."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_common.errors import InvalidTokenIds
from kiln_gateway.auth import require
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.schemas.text import MOST_TOKENS, DetokenizeBody, TokenizeBody

router = APIRouter(dependencies=[Depends(require("infer"))])


@router.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of messages as the chat template renders them."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, TokenizeBody)
    if body.text is not None:
        (token_ids,) = await gateway.prompts.encode([body.text], MOST_TOKENS, "text")
    else:
        text = await asyncio.to_thread(
            gateway.prompts.render_text,
            [message.to_template() for message in body.messages or []],
            tools=[tool.to_template() for tool in body.tools or []] or None,
            add_generation_prompt=body.add_generation_prompt,
            variables=gateway.prompts.variables(body.chat_template_kwargs),
        )
        (token_ids,) = await gateway.prompts.encode([text], MOST_TOKENS, "messages")
    return json_response({"tokens": token_ids, "count": len(token_ids)})


@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens written out."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, DetokenizeBody)
    num_tokens = gateway.tokenizer.num_tokens
    for position, token_id in enumerate(body.tokens):
        if token_id >= num_tokens:
            raise InvalidTokenIds(
                f"`tokens` has the id {token_id} at position {position}, the tokenizer has {num_tokens}",
                param="tokens",
            )
    return json_response({"text": gateway.tokenizer.decode(body.tokens)})
