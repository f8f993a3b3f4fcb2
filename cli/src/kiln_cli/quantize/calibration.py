"""A calibration text as the token ids of its documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kiln_cli.errors import CalibrationTooShort, FileUnreadable, InvalidJsonl
from kiln_cli.train.jsonl import Row, read_rows
from kiln_common.text.chat_template import ChatTemplate
from kiln_common.text.tokenizer import TextTokenizer

MAX_DOCUMENT_TOKENS = 2048
# A few times as many as the inputs of the widest layer of a 4B model, 9,216: with fewer the inputs seen
# span only a part of what the layer can read.
RECOMMENDED_TOKENS = 32_768
_FORMS = 'A line is {"text"}, {"messages"}, or {"prompt", "completion"}; other files are plain text.'


def read_documents(source: Path, model_folder: Path, max_tokens: int) -> list[list[int]]:
    """Documents of a file, `max_tokens` at most, in the tokens of the model in that folder.

    A `.jsonl` file has one on each line, conversations as the model's chat template renders them; any
    other file is one long text. What is longer than 2,048 tokens is cut into several.

    Raises:
        FileUnreadable: the file is not there, or not UTF-8.
        InvalidJsonl: a line is not an object, or has none of the forms.
    """
    tokenizer = TextTokenizer.load(model_folder)
    documents: list[list[int]] = []
    num_left = max_tokens
    for text in _texts(source, model_folder):
        ids = tokenizer.encode(text)[:num_left]
        documents += [ids[i : i + MAX_DOCUMENT_TOKENS] for i in range(0, len(ids), MAX_DOCUMENT_TOKENS)]
        num_left -= len(ids)
        if num_left <= 0:
            break
    return documents


def check_length(num_tokens: int) -> str | None:
    """What is to be said of a GPTQ calibration text of that length; None where it is long enough.

    Raises:
        CalibrationTooShort: it is shorter than one sequence.
    """
    if num_tokens < MAX_DOCUMENT_TOKENS:
        raise CalibrationTooShort(num_tokens, MAX_DOCUMENT_TOKENS, RECOMMENDED_TOKENS)
    if num_tokens < RECOMMENDED_TOKENS:
        return (
            f"the calibration text has {num_tokens:,} tokens, {RECOMMENDED_TOKENS:,} or more are recommended:"
            " with few, GPTQ fits the weights to just these"
        )
    return None


def _texts(source: Path, model_folder: Path) -> Iterator[str]:
    if source.suffix != ".jsonl":
        try:
            yield source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileUnreadable(f"{source} cannot be read: {error}") from None
        return
    template = ChatTemplate.load(model_folder)
    for row in read_rows(str(source)):
        yield _text(row, template, source)


def _text(row: Row, template: ChatTemplate, source: Path) -> str:
    fields = row.fields
    if isinstance(fields.get("text"), str):
        return str(fields["text"])
    messages: list[dict[str, Any]] | None = fields.get("messages")
    if messages is None and isinstance(fields.get("prompt"), str):
        messages = [
            {"role": "user", "content": fields["prompt"]},
            {"role": "assistant", "content": str(fields.get("completion", ""))},
        ]
    if not isinstance(messages, list):
        raise InvalidJsonl(f"{source} line {row.line}: no text and no conversation", hint=_FORMS)
    return template.render(messages, tools=fields.get("tools"), add_generation_prompt=False)
