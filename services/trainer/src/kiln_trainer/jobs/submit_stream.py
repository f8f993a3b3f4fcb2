"""A job that arrives in pieces, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator

from kiln_common.errors import InvalidRequest
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.errors import PayloadTooLarge


class InvalidSubmitStream(InvalidRequest):
    """The stream of a gRPC job does not begin with its settings, or has documents of another recipe."""

    code = "invalid_submit_stream"
    hint = "Send `settings` with sft, grpo or opd set, then documents of that recipe."


async def gather_request(
    parts: AsyncIterator[trainer_pb2.SubmitPart], max_bytes: int
) -> trainer_pb2.SubmitRequest:
    """The whole request.

    Raises:
        InvalidSubmitStream: the settings are not first, or a document belongs to another recipe.
        PayloadTooLarge: what has come so far is more than a job may have.
    """
    request: trainer_pb2.SubmitRequest | None = None
    recipe = ""
    num_bytes = 0
    async for part in parts:
        num_bytes += part.ByteSize()
        if num_bytes > max_bytes:
            raise PayloadTooLarge(f"the job has more than {max_bytes} bytes")
        kind = part.WhichOneof("part") or "nothing"
        if request is None:
            recipe = part.settings.WhichOneof("recipe") or ""
            if kind != "settings" or not recipe:
                raise InvalidSubmitStream(f"the stream begins with {kind}, and names no recipe")
            request = part.settings
        elif kind == "sft_example" and recipe == "sft":
            request.sft.examples.append(part.sft_example)
        elif kind == "grpo_group" and recipe == "grpo":
            request.grpo.groups.append(part.grpo_group)
        elif kind == "opd_prompt" and recipe == "opd":
            request.opd.prompts.append(part.opd_prompt)
        elif kind == "opd_rollout" and recipe == "opd":
            request.opd.rollouts.append(part.opd_rollout)
        else:
            raise InvalidSubmitStream(f"a job of {recipe} got {kind}")
    if request is None:
        raise InvalidSubmitStream("the stream is empty")
    return request
