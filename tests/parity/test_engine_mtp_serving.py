"""Answers with drafts of the multi-token-prediction layer against the same answers without.

On the demo model, whose layer is trained: most drafts are accepted. Passes of several lines sum in another
order, so tokens agree unless a draw falls on an edge, which the seeds here do not; log-probabilities
agree within 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer

from demo.data.rendering import render_prompt
from kiln_engine.domain import GenerationRequest, SamplingParams
from kiln_engine.domain.output_rules import OutputRules, ThinkingRules
from kiln_engine.domain.speculation import Candidate
from kiln_engine.speculation.speculator import DraftSpeculator
from tests.support.demo_serving import DEMO_MODEL
from tests.support.engine_serving import Answer, SlottedRequest, capture, load_adapters, make_runner, serve

_MAX_DRAFTS = 3
_PROMPTS = (
    "Reply to this email about the late invoice.",
    "What is 27 + 35?",
    "Write a short email about the broken lamp, and say when it will be repaired.",
)
_RULES = OutputRules(thinking=ThinkingRules(6, 4, before_end_token_ids=(8,), after_end_token_ids=(9, 10)))


def _request(number: int, rules: OutputRules | None = None, **params) -> GenerationRequest:
    prompt = render_prompt([{"role": "user", "content": _PROMPTS[number % len(_PROMPTS)]}])
    ids = tuple(Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(prompt).ids)
    sampling = SamplingParams(max_tokens=16, ignore_eos=True, **({"seed": number} | params))
    return GenerationRequest(f"r{number}", ids, sampling, rules=rules)


def _requests() -> list[SlottedRequest]:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "num_top_logprobs": 3},
        {"temperature": 0.7, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 1.0, "logit_bias": {5: 2.0}, "min_tokens": 6, "stop_token_ids": frozenset({17})},
    ]
    requests: list[SlottedRequest] = [(_request(number, **kind), ()) for number, kind in enumerate(kinds)]
    requests.append((_request(5, rules=_RULES, temperature=1.0), ()))
    requests.append((_request(6, temperature=1.0), ((1, 1.0),)))
    return requests


class ChangingLengths(DraftSpeculator):
    """Drafts of every length in turn, none at times."""

    def __init__(self) -> None:
        super().__init__(_MAX_DRAFTS, [1, 2, 4, 8], drafts_on_device=True, is_adaptive=False)
        self._num_asked = 0

    def lengths(self, candidates: Sequence[Candidate]) -> list[int]:
        self._num_asked += 1
        wanted = (3, 3, 1, 2, 0, 3)
        most = super().lengths(candidates)
        return [min(length, wanted[(self._num_asked // 4 + i) % 6]) for i, length in enumerate(most)]


@cache
def _plain() -> dict[str, Answer]:
    runner, limits = make_runner(DEMO_MODEL)
    load_adapters(runner)
    return serve(runner, limits, _requests())


def _longest() -> DraftSpeculator:
    return DraftSpeculator(_MAX_DRAFTS, [1, 2, 4, 8], drafts_on_device=True, is_adaptive=False)


@pytest.mark.parametrize(("make", "is_captured"), [(_longest, False), (ChangingLengths, True)])
def test_answers_are_the_same_and_come_in_fewer_steps(make, is_captured, monkeypatch):
    runner, limits = make_runner(DEMO_MODEL, max_draft_tokens=_MAX_DRAFTS, drafts_by_mtp=True)
    load_adapters(runner)
    if is_captured:
        capture(runner, monkeypatch)
    speculator, num_steps = make(), [0]

    def count(number, scheduler) -> None:
        num_steps[0] = scheduler.counters.num_steps

    requests = _requests() if is_captured else _requests()[:2]
    answers = serve(runner, limits, requests, speculator=speculator, on_step=count)
    for request_id in answers:
        plain = _plain()[request_id]
        assert answers[request_id].tokens == plain.tokens, request_id
        assert answers[request_id].finish_reason == plain.finish_reason
        assert answers[request_id].logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    (base, *_) = speculator.totals()
    assert base.num_accepted > 0.4 * base.num_proposed
    assert is_captured or num_steps[0] <= 14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu_draft_as_well(dtype, monkeypatch):
    """In float32 answers are the same; bfloat16 may part at a draw on an edge, and accepts as many drafts."""
    answers = []
    for speculator in (None, _longest()):
        memory = {"max_draft_tokens": _MAX_DRAFTS, "drafts_by_mtp": True} if speculator else {}
        runner, limits = make_runner(DEMO_MODEL, dtype, "cuda", **memory)
        load_adapters(runner)
        capture(runner, monkeypatch)
        answers.append(serve(runner, limits, _requests(), speculator=speculator))
    plain, drafted = answers
    if dtype is torch.float32:
        assert {key: each.tokens for key, each in plain.items()} == {
            key: each.tokens for key, each in drafted.items()
        }
    assert speculator is not None
    (base, *_) = speculator.totals()
    assert base.num_accepted > 0.4 * base.num_proposed
