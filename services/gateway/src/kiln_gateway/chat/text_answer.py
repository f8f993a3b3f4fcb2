"""OpenAI's answer objects for text completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.choice import ChoiceDelta, TokenLogprob
from kiln_gateway.chat.completion_run import Choice, CompletionRun
from kiln_gateway.chat.logprobs import echoed_logprobs, prompt_logprobs, text_logprobs
from kiln_gateway.chat.responses import envelope, usage_object, version_spans
from kiln_gateway.schemas.completions import TextCompletionBody


class TextAnswer:
    """Builds the objects of one text completion."""

    def __init__(
        self,
        run: CompletionRun,
        tokenizer: TextTokenizer,
        body: TextCompletionBody,
        *,
        includes_usage: bool = False,
    ) -> None:
        self._run = run
        self._tokenizer = tokenizer
        self._body = body
        self._includes_usage = includes_usage
        self._num_sent: dict[int, int] = {}  # characters of tokens already sent, by choice

    def whole(self) -> dict[str, Any]:
        body = envelope(self._run, "text_completion")
        body["choices"] = [self._whole_choice(choice) for choice in self._run.choices]
        body["usage"] = usage_object(self._run)
        if self._run.follows_latest:
            body["kiln"]["version_spans"] = version_spans(self._run, self._run.choices)
        return body

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        prompt = self._prompt(choice)
        own = self._choice(choice, choice.assembler.content, choice.assembler.tokens)
        if prompt["logprobs"] is not None:
            own["logprobs"] = {
                name: prompt["logprobs"][name] + values for name, values in own["logprobs"].items()
            }
        own["finish_reason"] = choice.assembler.finish_reason
        return {**prompt, **own, "text": prompt["text"] + own["text"]}

    def opening_chunk(self, choice: Choice) -> dict[str, Any] | None:
        """A choice's first chunk: what was asked about the prompt, if anything was."""
        body = self._body
        if not body.echo and not body.return_token_ids and body.prompt_logprobs is None:
            return None
        return self._chunk(self._prompt(choice))

    def chunks(self, choice: Choice, delta: ChoiceDelta) -> list[dict[str, Any]]:
        shows_tokens = (self._body.logprobs is not None or self._body.return_token_ids) and delta.tokens
        if not delta.content and not shows_tokens and delta.finish_reason is None:
            return []
        body = self._choice(choice, delta.content, delta.tokens)
        body["finish_reason"] = delta.finish_reason
        chunk = self._chunk(body)
        if delta.finish_reason is not None and self._run.follows_latest:
            chunk["kiln"]["version_spans"] = version_spans(self._run, [choice])
        return [chunk]

    def usage_chunk(self) -> dict[str, Any]:
        return {**envelope(self._run, "text_completion"), "choices": [], "usage": usage_object(self._run)}

    def _prompt(self, choice: Choice) -> dict[str, Any]:
        """The part of a choice that is about its prompt."""
        body, token_ids = self._body, list(choice.request.prompt_token_ids)
        known = choice.assembler.prompt_logprobs
        shown: dict[str, Any] = {"index": choice.index, "text": "", "logprobs": None, "finish_reason": None}
        if body.echo:
            shown["text"] = self._tokenizer.decode(token_ids)
        if body.echo and body.logprobs is not None:
            shown["logprobs"] = echoed_logprobs(self._tokenizer, token_ids, known, body.logprobs)
            self._num_sent[choice.index] = sum(map(len, shown["logprobs"]["tokens"]))
        if body.prompt_logprobs is not None:
            num_top = body.prompt_logprobs
            shown["prompt_logprobs"] = prompt_logprobs(self._tokenizer, token_ids, known, num_top)
        if body.return_token_ids:
            shown["prompt_token_ids"] = token_ids
            shown["token_ids"] = []
        return shown

    def _choice(self, choice: Choice, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The part that was generated."""
        shown: dict[str, Any] = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None}
        if self._body.logprobs is not None:
            offset = self._num_sent.get(choice.index, 0)
            logprobs = text_logprobs(self._tokenizer, tokens, offset)
            self._num_sent[choice.index] = offset + sum(map(len, logprobs["tokens"]))
            shown["logprobs"] = logprobs
        if self._body.return_token_ids:
            shown["token_ids"] = [token.token_id for token in tokens]
        return shown

    def _chunk(self, choice_body: dict[str, Any]) -> dict[str, Any]:
        body = envelope(self._run, "text_completion")
        body["choices"] = [choice_body]
        if self._includes_usage:
            body["usage"] = None
        return body
