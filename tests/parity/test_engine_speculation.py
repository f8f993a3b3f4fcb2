"""Answers with drafts against answers without, on the real scheduler and runner in float32.

Lines of one pass are summed in other orders than steps of their own, so tokens agree unless a draw
falls on an edge, which the seeds here do not; log-probabilities agree within 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_common.text.tokenizer import TextTokenizer
from kiln_engine.domain import AdapterUse, FinishReason, GenerationRequest, SamplingParams
from kiln_engine.domain.output_rules import OutputRules, ThinkingRules
from kiln_engine.domain.speculation import Candidate
from kiln_engine.grammar import ThreadedCompiler
from kiln_engine.scheduling import Scheduler
from kiln_engine.speculation.speculator import DraftSpeculator
from kiln_nn.config import ModelConfig
from tests.support.demo_serving import DEMO_MODEL
from tests.support.engine_plans import token_ids
from tests.support.engine_scheduling import Guesser
from tests.support.engine_serving import (
    KERNEL_SHAPE,
    Answer,
    SlottedRequest,
    capture,
    load_adapters,
    make_runner,
    serve,
)
from tests.support.tiny_models import make_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUM_TOKENS = 12
VOCAB_SIZE = 300
# Free until the budget is spent, in the middle of lines, then constrained token by token.
_RULES = OutputRules(thinking=ThinkingRules(7, 6, before_end_token_ids=(8,), after_end_token_ids=(9, 10)))
SHARED = token_ids(70, seed=3)
KINDS: list[tuple[list[int], dict[str, Any]]] = [
    (token_ids(20), {}),
    (SHARED, {"temperature": 0.0}),
    (SHARED[:64] + token_ids(9, seed=4), {"top_p": 0.9, "top_k": 40}),
    (token_ids(3, seed=5), {"num_top_logprobs": 3}),
    (token_ids(40, seed=6), {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}),
    (SHARED[:64] + token_ids(10, seed=7), {"min_p": 0.05, "logit_bias": {5: 4.0}}),
    (token_ids(17, seed=9), {"min_tokens": 5, "stop_token_ids": frozenset(range(8, VOCAB_SIZE))}),
    (token_ids(1, seed=10), {}),
    (token_ids(40, seed=11), {"rules": _RULES}),
    (token_ids(5, seed=12), {"rules": _RULES, "num_top_logprobs": 2}),
]


def requests(with_adapters: bool = False) -> list[SlottedRequest]:
    made = []
    for number, (prompt, fields) in enumerate(KINDS[:5] if with_adapters else KINDS):
        sampling = dict(fields)
        rules = sampling.pop("rules", None)
        params = SamplingParams(**{"max_tokens": NUM_TOKENS, "seed": 11 + number, **sampling})
        slot = number % 3 if with_adapters else 0
        uses = (AdapterUse(f"sha-{slot}"),) if slot else ()
        request = GenerationRequest(f"r{number}", tuple(prompt), params, adapters=uses, rules=rules)
        made.append((request, ((slot, 1.0),) if slot else ()))
    return made


def oracle(
    plain: dict[str, Answer], made: list[SlottedRequest], period: int
) -> Callable[[Candidate, int], Any]:
    """Guesses what the requests got without drafts; with a period, every so manieth token is another."""
    answers = {request.prompt_token_ids: plain[request.request_id].tokens for request, _ in made}

    def guess(candidate: Candidate, count: int) -> list[int]:
        prompt = tuple(candidate.token_ids[: candidate.num_prompt_tokens])
        first = len(candidate.token_ids) - len(prompt)
        coming = list(enumerate(answers[prompt]))[first : first + count]
        return [(t + 1) % VOCAB_SIZE if period and i % period == period - 1 else t for i, t in coming]

    return guess


def check_same(actual: dict[str, Answer], plain: dict[str, Answer]) -> None:
    assert actual.keys() == plain.keys()
    for name, expected in plain.items():
        answer = actual[name]
        assert answer.tokens == expected.tokens, name
        assert answer.finish_reason is expected.finish_reason
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        sampled = [[row.sampled_logprob for row in each.rows] for each in (answer, expected)]
        assert sampled[0] == pytest.approx(sampled[1], abs=1e-3)
        for row, wanted in zip(answer.rows, expected.rows, strict=True):
            assert [token for token, _ in row.top_logprobs] == [token for token, _ in wanted.top_logprobs]
            tops = [[logprob for _, logprob in each.top_logprobs] for each in (row, wanted)]
            assert tops[0] == pytest.approx(tops[1], abs=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculation")
    make_checkpoint(folder, seed=6)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[bool, dict[str, Answer]]:
    """Answers without drafts, without and with adapters."""
    answers = {}
    for with_adapters in (False, True):
        runner, limits = make_runner(folder)
        if with_adapters:
            load_adapters(runner)
        answers[with_adapters] = serve(runner, limits, requests(with_adapters))
    return answers


@pytest.mark.parametrize(("period", "with_adapters"), [(0, False), (1, False), (3, True)])
def test_drafts_change_no_answer(folder: Path, plain: Any, period: int, with_adapters: bool):
    runner, limits = make_runner(folder, max_draft_tokens=3)
    if with_adapters:
        load_adapters(runner)
    made = requests(with_adapters)
    guesser = Guesser(oracle(plain[with_adapters], made, period))
    check_same(serve(runner, limits, made, speculator=guesser), plain[with_adapters])
    share = guesser.num_accepted / guesser.num_drafted
    assert share == {0: 1.0, 1: 0.0}.get(period, pytest.approx(0.5, abs=0.2))
    if not with_adapters:
        stopped = plain[False]["r6"]
        assert stopped.finish_reason is FinishReason.STOP
        assert 5 < len(stopped.rows) < NUM_TOKENS


def test_rows_of_different_lengths_and_plain_ones_take_turns(folder: Path, plain: Any):
    """Whoever guesses, and how far, changes every few steps: folds, plain steps and run-ahead between."""
    runner, limits = make_runner(folder, max_draft_tokens=5)
    made, now = requests(), [0]
    guesser = Guesser(
        oracle(plain[False], made, 4),
        max_draft_tokens=5,
        wants=lambda candidate: (now[0] // 4 + candidate.sequence_id) % 6 if now[0] // 8 % 2 else 0,
    )

    def on_step(number: int, scheduler: Scheduler) -> None:
        now[0] = number

    check_same(serve(runner, limits, made, speculator=guesser, on_step=on_step), plain[False])
    assert guesser.num_accepted > 10


def test_drafts_from_the_text_change_no_answer(folder: Path):
    """Prompts that repeat themselves, so that the text proposes; their seconds turns hit the cache."""
    phrase = token_ids(9, seed=30)

    def both_turns(max_draft_tokens: int) -> tuple[dict[str, Answer], DraftSpeculator]:
        runner, limits = make_runner(folder, max_draft_tokens=max_draft_tokens)
        speculator = DraftSpeculator(3, [12], drafts_on_device=False, is_adaptive=False)
        first = [
            (GenerationRequest(f"r{i}", tuple(phrase * (2 + i)), SamplingParams(40, seed=i, top_k=2)), ())
            for i in range(2)
        ]
        answers = serve(runner, limits, first, speculator=speculator if max_draft_tokens else None)
        return answers, speculator

    (plain, _), (guessed, speculator) = both_turns(0), both_turns(3)
    check_same(guessed, plain)
    [totals] = speculator.totals()
    assert 0 < totals.num_accepted < totals.num_proposed


def test_requests_that_give_way_get_the_same(folder: Path):
    """Two prompts of two pages that grow to four each, and seven pages."""
    made: list[SlottedRequest] = [
        (GenerationRequest(f"r{i}", tuple(token_ids(30, seed=80 + i)), SamplingParams(24, seed=i)), ())
        for i in range(2)
    ]
    plain = serve(*make_runner(folder), made)
    runner, limits = make_runner(folder, max_draft_tokens=3, kv_cache_tokens=7 * 16)
    guesser = Guesser(oracle(plain, made, 3))
    scheduler = Scheduler(limits, frozenset(), guesser)
    check_same(serve(runner, limits, made, scheduler=scheduler, steps_between=0), plain)
    assert scheduler.counters.num_preemptions > 0
    assert guesser.num_accepted > 10


def test_a_next_turn_starts_from_what_a_guessed_answer_left(folder: Path, plain: Any):
    runner, limits = make_runner(folder, max_draft_tokens=3)
    made = requests()[:3]
    scheduler = Scheduler(limits, frozenset(), Guesser(oracle(plain[False], made, 0)))
    answers = serve(runner, limits, made, scheduler=scheduler)
    turns: list[SlottedRequest] = []
    for request, _ in made:
        whole = (*request.prompt_token_ids, *answers[request.request_id].tokens, 3, 4)
        turns.append((GenerationRequest(f"{request.request_id} next", whole, SamplingParams(8, seed=5)), ()))
    fresh = serve(*make_runner(folder), turns)
    scheduler = Scheduler(limits, frozenset(), Guesser(oracle(plain[False] | fresh, made + turns, 3)))
    serve(runner, limits, made, scheduler=scheduler)
    cached = serve(runner, limits, turns, scheduler=scheduler)
    check_same(cached, fresh)
    # Into the answers, at most two pages before their ends.
    for request, _ in turns:
        num_tokens = len(request.prompt_token_ids)
        assert cached[request.request_id].num_cached_tokens > num_tokens - 3 * limits.page_tokens


async def test_a_json_schema_holds_in_every_line():
    """Drafts from the text of the schema's own keys, on the demo model with its tokenizer."""
    tokenizer = TextTokenizer.load(DEMO_MODEL)
    config = ModelConfig.from_folder(DEMO_MODEL)
    properties = {
        name: {"type": "string", "enum": ["first", "second"]} for name in ("alpha", "beta", "gamma")
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    end = tokenizer.id_of("<|im_end|>")
    compiler = ThreadedCompiler(
        DEMO_MODEL / "tokenizer.json", vocab_size=config.vocab_size, end_token_ids=[end], time_limit_s=30.0
    )
    grammar = await compiler.compile("json_schema", json.dumps(schema))
    compiler.close()
    example = tokenizer.encode('{"alpha": "first", "beta": "first", "gamma": "second"}')
    answers = []
    for max_draft_tokens in (0, 3):
        runner, limits = make_runner(DEMO_MODEL, max_draft_tokens=max_draft_tokens)
        speculator = DraftSpeculator(3, [12], drafts_on_device=False, is_adaptive=False)
        made = [
            (
                GenerationRequest(
                    f"r{seed}",
                    tuple(example * 2),
                    # JSON allows blanks between its parts, and this model likes dozens after a line break.
                    SamplingParams(150, seed=seed, stop_token_ids=frozenset({end})),
                    rules=OutputRules(grammar=grammar),
                ),
                (),
            )
            for seed in range(1)
        ]
        answers.append(serve(runner, limits, made, speculator=speculator if max_draft_tokens else None))
    check_same(answers[1], answers[0])
    [totals] = speculator.totals()
    assert totals.num_accepted > 2
    for answer in answers[1].values():
        assert answer.finish_reason is FinishReason.STOP
        assert set(json.loads(tokenizer.decode(answer.tokens[:-1]))) == set(properties)


@pytest.mark.gpu
@needs_gpu
def test_bfloat16_lines_stay_close_to_single_steps(tmp_path: Path):
    """Greedy, each line forced along the plain answer: log-probabilities part by bfloat16's rounding."""
    make_checkpoint(tmp_path, seed=6, **KERNEL_SHAPE)
    made = [
        (replace(request, sampling=replace(request.sampling, temperature=0.0, logit_bias={9: 1e4})), slots)
        for request, slots in requests()
        if request.rules is None and not request.sampling.needs_history
    ]
    answers: list[dict[str, Answer]] = []
    for max_draft_tokens in (0, 3):
        runner, limits = make_runner(tmp_path, torch.bfloat16, "cuda", max_draft_tokens=max_draft_tokens)
        runner.capture()
        guesser = Guesser(oracle(answers[0], made, 3)) if max_draft_tokens else None
        answers.append(serve(runner, limits, made, speculator=guesser))
    for name, plain in answers[0].items():
        assert answers[1][name].tokens == plain.tokens
        assert answers[1][name].logprobs == pytest.approx(plain.logprobs, abs=0.1)


@pytest.mark.parametrize(
    ("device", "with_adapters"),
    [
        ("cpu", True),
        pytest.param("cuda", False, marks=[pytest.mark.gpu, needs_gpu]),
        pytest.param("cuda", True, marks=[pytest.mark.gpu, needs_gpu]),
    ],
)
def test_replayed_verify_steps_give_what_plain_ones_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_adapters: bool, device: str
):
    make_checkpoint(tmp_path, seed=6, **KERNEL_SHAPE)
    made = requests(with_adapters)
    answers: list[dict[str, Answer]] = []
    for max_draft_tokens in (0, 3):
        runner, limits = make_runner(
            tmp_path, device=device, max_draft_tokens=max_draft_tokens, max_running=4
        )
        if with_adapters:
            load_adapters(runner)
        guesser = None
        if max_draft_tokens:
            capture(runner, monkeypatch)
            guesser = Guesser(oracle(answers[0], made, 3))
        answers.append(serve(runner, limits, made, speculator=guesser))
    check_same(answers[1], answers[0])
    assert guesser is not None
    assert guesser.num_accepted > 10
