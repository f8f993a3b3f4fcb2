"""POST /v1/train/sft: examples to weighted token documents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kiln_common.errors import InvalidRequest
from kiln_common.pb import trainer_pb2
from kiln_gateway.chat.prepare import canonical_messages
from kiln_gateway.corrections import Correction
from kiln_gateway.schemas.chat import ChatMessage
from kiln_gateway.schemas.training import SftBody, SftExampleFields
from kiln_gateway.training.documents import Document, DocumentBuilder, Turn, weigh_answer
from kiln_gateway.training.kept_rollouts import KeptRollouts


class DatasetRowRefused(InvalidRequest):
    """A row that was kept cannot be learned from as the job wants it."""

    code = "dataset_row_refused"
    hint = "Mend the row and upload the dataset again, or send train_on: all."


async def sft_spec(body: SftBody, builder: DocumentBuilder, rollouts: KeptRollouts) -> trainer_pb2.SftSpec:
    """The documents of every example, in order. Raises TemplateRefused, NoAssistantMessage."""
    documents: list[Document] = []
    for example in body.examples or ():
        documents += await _documents(example, body.train_on == "all", builder, rollouts)
    return to_spec(documents)


async def dataset_spec(
    dataset_id: str, rows: Sequence[tuple[int, SftExampleFields]], body: SftBody, builder: DocumentBuilder
) -> trainer_pb2.SftSpec:
    """The documents of a dataset's rows, each with its line's number. Raises DatasetRowRefused.

    Its texts are tokenised as they stand: no kept rollout is looked for.
    """
    documents: list[Document] = []
    for line, example in rows:
        try:
            documents += await _documents(example, body.train_on == "all", builder, None)
        except InvalidRequest as error:
            raise DatasetRowRefused(
                f"line {line} of {dataset_id}: {error} ({error.code})", param="dataset"
            ) from error
    return to_spec(documents)


def correction_documents(corrections: Sequence[Correction]) -> list[Document]:
    """The better answers after the very tokens that led to the others."""
    return [
        weigh_answer(Turn(each.context_token_ids, each.completion_token_ids), 1.0, includes_prompt=False)
        for each in corrections
    ]


def to_spec(documents: Sequence[Document]) -> trainer_pb2.SftSpec:
    return trainer_pb2.SftSpec(
        examples=[
            trainer_pb2.SftExample(token_ids=document.token_ids, loss_weights=document.loss_weights)
            for document in documents
        ]
    )


async def _documents(
    example: SftExampleFields, trains_on_all: bool, builder: DocumentBuilder, rollouts: KeptRollouts | None
) -> list[Document]:
    if example.prompt is not None and example.completion is not None:
        messages = user_message(example.prompt)
        turn = await _pair_turn(messages, example.completion, builder, rollouts)
        return [weigh_answer(turn, example.weight, includes_prompt=trains_on_all)]
    conversation = canonical_messages(example.messages or ())
    tools = [tool.to_template() for tool in example.tools or ()] or None
    if trains_on_all:
        return [await asyncio.to_thread(builder.whole_document, conversation, tools, example.weight)]
    return await asyncio.to_thread(builder.assistant_documents, conversation, tools, example.weight)


async def _pair_turn(
    messages: list[dict[str, str]], completion: str, builder: DocumentBuilder, rollouts: KeptRollouts | None
) -> Turn:
    kept = await rollouts.by_text(messages, completion) if rollouts is not None else None
    if kept is not None:
        return Turn(kept.prompt_token_ids, kept.completion_token_ids)
    return await asyncio.to_thread(builder.completion_turn, messages, completion)


def user_message(prompt: str) -> list[dict[str, str]]:
    """A prompt as the short forms mean it: one user message."""
    return canonical_messages([ChatMessage.model_validate({"role": "user", "content": prompt})])
