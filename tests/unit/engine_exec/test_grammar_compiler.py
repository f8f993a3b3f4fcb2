"""Compiling grammars: once for equal texts, within a time limit, and what matchers allow as bits."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from kiln_common.errors import GrammarNotSupported, GrammarTooLarge
from kiln_common.text.tokenizer import TextTokenizer
from kiln_engine.domain.errors import GrammarFailed, GrammarsUnavailable, GrammarTooSlow
from kiln_engine.domain.output_rules import Allowance
from kiln_engine.domain.plan import RowSampling
from kiln_engine.domain.request import SamplingParams
from kiln_engine.execution.token_masks import token_masks
from kiln_engine.grammar import MaskWriter, ThreadedCompiler
from kiln_nn.kernels.token_mask import num_words
from tests.support.demo_serving import DEMO_MODEL

TOKENIZER = TextTokenizer.load(DEMO_MODEL)
END = TOKENIZER.id_of("<|im_end|>")
VOCAB = TOKENIZER.num_tokens + 70  # padded, as published checkpoints are


@pytest.fixture
async def compiler():
    compiler = make_compiler()
    yield compiler
    compiler.close()


def make_compiler(time_limit_s: float = 30.0, path=DEMO_MODEL / "tokenizer.json") -> ThreadedCompiler:
    return ThreadedCompiler(path, vocab_size=VOCAB, end_token_ids=[END], time_limit_s=time_limit_s)


def allowed_by(matcher) -> list[str]:
    bits = np.zeros((1, num_words(VOCAB)), dtype=np.int32)
    MaskWriter(1).write([(0, matcher)], bits)
    ids = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()
    assert all(token_id < TOKENIZER.num_tokens for token_id in ids)
    return [TOKENIZER.decode([token_id]) for token_id in ids]


async def test_equal_grammars_are_compiled_once_and_followed_apart(compiler):
    first, second = await asyncio.gather(*(compiler.compile("regex", "[ab]c") for _ in range(2)))
    assert first is second
    one, other = first.start(), second.start()
    one.advance(TOKENIZER.id_of("a"))
    assert allowed_by(one) == ["c"]
    assert set(allowed_by(other)) == {"a", "b", *(t for t in ("ac", "bc") if TOKENIZER.id_of(t))}
    one.advance(TOKENIZER.id_of("c"))
    assert one.is_at_end
    assert not other.is_at_end
    ahead = other.fork()
    ahead.advance(TOKENIZER.id_of("b"))
    assert allowed_by(ahead) == ["c"]
    assert "a" in allowed_by(other)
    assert allowed_by(one) == ["<|im_end|>"]
    assert await compiler.compile("lark", "start: /[ab]c/") is not first


async def test_the_oldest_are_forgotten(compiler):
    first = await compiler.compile("regex", "x")
    for number in range(80):
        await compiler.compile("regex", f"y{number}")
    assert await compiler.compile("regex", "x") is not first
    assert len(compiler._known) <= 64


async def test_a_grammar_that_fails_is_refused_each_time(compiler):
    for _ in range(2):
        with pytest.raises(GrammarNotSupported, match="unclosed group"):
            await compiler.compile("regex", "(a")
    with pytest.raises(GrammarTooLarge, match="1001 properties"):
        await compiler.compile(
            "json_schema", '{"properties": {' + ", ".join(f'"p{i}": {{}}' for i in range(1001)) + "}}"
        )
    assert not compiler._known


async def test_one_that_takes_too_long_is_refused_and_the_next_is_not(monkeypatch):
    compiler, may_end = make_compiler(time_limit_s=30), threading.Event()
    await compiler.compile("regex", "a")
    compiler._time_limit_s = 0.2
    build = compiler._build

    def slow(language, text):
        if text == "slow":
            may_end.wait(60)
        return build(language, text)

    monkeypatch.setattr(compiler, "_build", slow)
    with pytest.raises(GrammarTooSlow, match=r"0\.2 s"):
        await compiler.compile("regex", "slow")
    may_end.set()
    compiler._time_limit_s = 30
    assert (await compiler.compile("regex", "slow")).start() is not None
    compiler.close()


async def test_a_tokenizer_that_cannot_be_read_refuses_grammars(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    compiler = make_compiler(path=tmp_path / "tokenizer.json")
    with pytest.raises(GrammarsUnavailable):
        await compiler.compile("regex", "a")
    compiler.close()


async def test_a_token_that_is_not_allowed_fails_the_matcher(compiler):
    matcher = (await compiler.compile("regex", "ab")).start()
    with pytest.raises(GrammarFailed):
        matcher.advance(TOKENIZER.id_of("x"))


class Fixed:
    """A constraint that allows the same all the time."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance


async def test_masks_hold_what_each_row_may_draw(compiler):
    matcher = (await compiler.compile("regex", "(ab)?")).start()
    at_end = (await compiler.compile("regex", "a")).start()
    at_end.advance(TOKENIZER.id_of("a"))
    stops = frozenset({END})
    allowances = [
        None,
        Allowance(only=VOCAB - 1),
        Allowance(),
        Allowance(matcher=matcher, banned_token_ids=stops),
        Allowance(banned_token_ids=frozenset({0, 31, 32})),
        Allowance(matcher=at_end, banned_token_ids=stops),  # nothing is left without the stop
    ]
    rows = [
        RowSampling(SamplingParams(), 0, constraint=None if allowance is None else Fixed(allowance))
        for allowance in allowances
    ]
    masks = token_masks(rows, VOCAB, torch.device("cpu"))
    assert masks.rows_M.tolist() == [1, 3, 4, 5]
    logits = torch.zeros(len(rows), VOCAB)
    masks.apply_(logits)
    allowed = [logits[row].isfinite().nonzero()[:, 0].tolist() for row in range(len(rows))]
    assert [len(allowed[row]) for row in (0, 2)] == [VOCAB, VOCAB]
    assert allowed[1] == [VOCAB - 1]
    assert {TOKENIZER.decode([token]) for token in allowed[3]} <= {"a", "ab"}
    assert sorted({*range(VOCAB)} - {*allowed[4]}) == [0, 31, 32]
    assert allowed[5] == [END]
    assert token_masks(rows[:1] + rows[2:3], VOCAB, torch.device("cpu")) is None
