"""Compiles grammars on threads of its own, within a time limit, and remembers them."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from kiln_common.errors import GrammarNotSupported, GrammarTooLarge
from kiln_common.json_grammar import JSON_WHITE_SPACE, MOST_GRAMMAR_BYTES
from kiln_engine.domain.errors import GrammarsUnavailable, GrammarTooSlow
from kiln_engine.grammar.matching import TokenMatcher, reason_of

# Each may follow each, so the work of a step grows with their number.
_MOST_PROPERTIES = 1000
_MOST_NESTED = 200
_NUM_REMEMBERED = 64
_NUM_THREADS = 2
_DEFAULTS: Any = JSON_WHITE_SPACE
# What one grammar may cost, in the library's own measures: about 20 ms to compile its expressions,
# 15 ms for a mask, 100 MB of states.
_LIMITS = LLParserLimits(
    max_items_in_row=8_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)


class CompiledGrammar:
    """A grammar ready to be followed."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> TokenMatcher:
        return TokenMatcher(self._matcher.deep_copy())


class ThreadedCompiler:
    """See domain.ports.GrammarCompiler. `compile` is called on one asyncio loop.

    The tokenizer is read in the background from the start. Ids from the tokenizer's last to
    `vocab_size` are padding and never allowed; `end_token_ids` are what may follow a whole text.
    """

    def __init__(
        self, tokenizer_path: Path, *, vocab_size: int, end_token_ids: Sequence[int], time_limit_s: float
    ) -> None:
        self._time_limit_s = time_limit_s
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._tokenizer: Future[LLTokenizer] = self._threads.submit(
            lambda: LLTokenizer(str(tokenizer_path), n_vocab=vocab_size, eos_token=list(end_token_ids))
        )
        self._known: OrderedDict[bytes, asyncio.Future[CompiledGrammar]] = OrderedDict()

    async def compile(self, language: str, text: str) -> CompiledGrammar:
        """See the port. Grammars that fail are not remembered."""
        if len(text.encode()) > MOST_GRAMMAR_BYTES:
            raise GrammarTooLarge(f"the grammar has more than {MOST_GRAMMAR_BYTES} bytes")
        await self._wait_for_tokenizer()
        key = sha256(f"{language}:{text}".encode()).digest()
        known = self._known.get(key)
        if known is None:
            running = asyncio.get_running_loop().run_in_executor(self._threads, self._build, language, text)
            known = self._known[key] = running
            running.add_done_callback(lambda done: self._forget_failed(key, done))
            if len(self._known) > _NUM_REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        try:
            return await asyncio.wait_for(asyncio.shield(known), self._time_limit_s)
        except TimeoutError:
            raise GrammarTooSlow(self._time_limit_s) from None

    async def _wait_for_tokenizer(self) -> None:
        try:
            await asyncio.wrap_future(self._tokenizer)
        except Exception as error:
            raise GrammarsUnavailable(f"the tokenizer cannot be read: {error}") from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget_failed(self, key: bytes, done: asyncio.Future[CompiledGrammar]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._known.get(key) is done:
            del self._known[key]

    def _build(self, language: str, text: str) -> CompiledGrammar:
        matcher = LLMatcher(
            self._tokenizer.result(), _to_library(language, text), log_level=0, limits=_LIMITS
        )
        if matcher.is_error():
            raise GrammarNotSupported(reason_of(matcher.get_error()))
        return CompiledGrammar(matcher)


def _to_library(language: str, text: str) -> str:
    """The grammar in the library's own form. Raises GrammarNotSupported, GrammarTooLarge."""
    try:
        match language:
            case "json_schema":
                _check_size(json.loads(text))
                return LLMatcher.grammar_from_json_schema(text, defaults=_DEFAULTS)
            case "regex":
                return LLMatcher.grammar_from_regex(text)
            case "lark":
                return LLMatcher.grammar_from_lark(text)
            case "ebnf":
                return LLMatcher.grammar_from_lark(_ebnf_to_lark(text))
            case _:
                raise GrammarNotSupported(f"there is no language {language!r}")
    except RecursionError:
        raise GrammarTooLarge("the grammar is nested too deeply") from None
    except ValueError as error:
        raise GrammarNotSupported(str(error)) from None


def _ebnf_to_lark(text: str) -> str:
    try:
        return any_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # noqa: BLE001 the library raises whatever it comes upon
        raise GrammarNotSupported(f"it is no EBNF: {error}") from None


def _check_size(schema: Any) -> None:
    """Measure how deep the schema is and how many properties its objects have. Raises GrammarTooLarge."""
    num_properties = 0
    pending = [(schema, 1)]
    while pending:
        part, depth = pending.pop()
        if depth > _MOST_NESTED:  # where a parser's recursion ends differs between versions of Python
            raise GrammarTooLarge(f"the schema is nested more than {_MOST_NESTED} deep")
        if isinstance(part, dict):
            properties = part.get("properties")
            num_properties += len(properties) if isinstance(properties, dict) else 0
            pending.extend((inner, depth + 1) for inner in part.values())
        elif isinstance(part, list):
            pending.extend((inner, depth + 1) for inner in part)
    if num_properties > _MOST_PROPERTIES:
        raise GrammarTooLarge(f"the schema has {num_properties} properties, the limit is {_MOST_PROPERTIES}")
