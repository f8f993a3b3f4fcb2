"""Embeddings: the last token's hidden state of each text, from one prefill of all of them together."""

from __future__ import annotations

import base64
import contextlib
import math
import struct
from collections.abc import Sequence
from typing import Any

from kiln_common import tracing
from kiln_common.errors import EngineUnavailable, InvalidValue
from kiln_common.ids import new_id
from kiln_common.pb import engine_pb2
from kiln_gateway.chat.prepare import prompt_tokens
from kiln_gateway.gateway import Gateway
from kiln_gateway.model_resolver import Target
from kiln_gateway.schemas.embeddings import EmbeddingsBody
from kiln_gateway.together import together

# Draws nothing.
_NO_SAMPLING = engine_pb2.SamplingParams(max_tokens=0, temperature=1, top_p=1, repetition_penalty=1)


async def embedding_requests(
    gateway: Gateway, body: EmbeddingsBody, target: Target
) -> list[engine_pb2.GenerateRequest]:
    """An engine request for each input. Raises PromptTooLong, InvalidTokenIds, InvalidText."""
    embedding_id = new_id("embd")
    return [
        engine_pb2.GenerateRequest(
            request_id=f"{embedding_id}-{index}",
            prompt_token_ids=token_ids,
            sampling=_NO_SAMPLING,
            adapters=target.adapters,
            priority=body.priority or 0,
            timeout_s=gateway.settings.request_timeout_s,
            wants_embedding=True,
            traceparent=tracing.current_traceparent(),
        )
        for index, token_ids in enumerate(await prompt_tokens(gateway, body.input, "input"))
    ]


async def embed(gateway: Gateway, requests: Sequence[engine_pb2.GenerateRequest]) -> list[list[float]]:
    """Each request's embedding. All run side by side; the first that fails ends the others."""
    return await together(_embed_one(gateway, request) for request in requests)


async def _embed_one(gateway: Gateway, request: engine_pb2.GenerateRequest) -> list[float]:
    async with contextlib.aclosing(gateway.engines.generate(request)) as outputs:
        async for output in outputs:
            if output.finish_reason:
                gateway.metrics.prompt_tokens.inc(len(request.prompt_token_ids))
                return list(output.embedding)
    raise EngineUnavailable("the engine ended the sequence without an embedding")


def shortened(vector: Sequence[float], num_dimensions: int | None) -> Sequence[float]:
    """The vector's first numbers, scaled to length 1. Raises InvalidValue: it has not so many."""
    if num_dimensions is None:
        return vector
    if num_dimensions > len(vector):
        raise InvalidValue(
            f"`dimensions` is {num_dimensions}, the model's hidden state has {len(vector)}",
            param="dimensions",
            hint="Ask for fewer, or leave the field out for all of them.",
        )
    part = vector[:num_dimensions]
    length = math.sqrt(math.fsum(value * value for value in part)) or 1.0
    return [value / length for value in part]


def embedding_object(index: int, vector: Sequence[float], encoding_format: str | None) -> dict[str, Any]:
    """OpenAI's object; base64 holds little-endian float32."""
    shown: Any = list(vector)
    if encoding_format == "base64":
        shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": shown}
