"""POST /v1/embeddings."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_gateway import sse
from kiln_gateway.auth import Caller, require
from kiln_gateway.chat.prepare import resolve_target
from kiln_gateway.embeddings import embed, embedding_object, embedding_requests, shortened
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.schemas.embeddings import EmbeddingsBody

router = APIRouter()
_INFER = Depends(require("infer"))


@router.post("/v1/embeddings")
async def embeddings(request: Request, caller: Caller = _INFER) -> Response:
    """A vector of length 1 for each text: the last token's hidden state."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, EmbeddingsBody)
    target = await resolve_target(gateway, body, caller)
    requests = await embedding_requests(gateway, body, target)
    vectors = await sse.until_disconnect(request, embed(gateway, requests))
    num_tokens = sum(len(one.prompt_token_ids) for one in requests)
    gateway.limits.charge(caller, num_tokens)
    answer = {
        "object": "list",
        "data": [
            embedding_object(index, shortened(vector, body.dimensions), body.encoding_format)
            for index, vector in enumerate(vectors)
        ],
        "model": body.model or await gateway.served_model_id(),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "kiln": {"adapter": target.label},
    }
    return json_response(answer, headers={"X-Kiln-Adapter": target.label})
