"""Scheduler and torch runner together against transformers' Qwen3.5, float32.

Every logit row a token was drawn from is kept and compared with transformers' logits at that place
of the finished sequence. Tolerance as in test_engine_paged_model.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_engine.domain import AdapterUse, BatchPlan, GenerationRequest, SamplingParams
from kiln_engine.domain.ports import PendingStep
from kiln_engine.execution.memory_plan import MemoryRequest, plan_memory
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from kiln_nn.config import ModelConfig
from kiln_nn.lora import serialize_adapter
from tests.support.engine_plans import relative_error, token_ids
from tests.support.lora_builders import peft_model_with, random_lora
from tests.support.tiny_models import SHAPES, hf_model, make_checkpoint, read_tensors
from tests.support.variants import as_engine_holds_them, draft_memory, speculator

TOLERANCE = 1e-4


@dataclass
class Finished:
    prompt: list[int]
    drawn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    num_cached_tokens: int = 0


class ScheduledEngine:
    """The real scheduler and runner, stepped by hand; keeps the logits behind every token.

    With `run_ahead` 1 a step is launched before the one ahead of it is committed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_pages: int = 64,
        budget: int = 64,
        max_running: int = 6,
        run_ahead: int = 0,
    ) -> None:
        config = ModelConfig.from_folder(folder)
        request = MemoryRequest(
            page_tokens=16,
            max_model_len=256,
            max_running=max_running,
            step_token_budget=budget,
            num_adapter_slots=2,
            max_adapter_rank=4,
            kv_cache_tokens=num_pages * 16,
            **draft_memory(),
        )
        memory = plan_memory(config, request, torch.float32, free_bytes=2**30)
        self.runner = TorchRunner(config, as_engine_holds_them(read_tensors(folder)), memory)
        self.scheduler = Scheduler(
            SchedulerLimits(
                num_pages=memory.num_pages,
                num_state_slots=memory.num_state_slots,
                max_model_len=256,
                max_running=max_running,
                step_token_budget=budget,
                max_draft_tokens=memory.max_draft_tokens,
            ),
            frozenset(),
            speculator([max_running]),
        )
        self._run_ahead = run_ahead
        self._launched: deque[tuple[BatchPlan, PendingStep, list[torch.Tensor]]] = deque()
        # Logits of the passes of the step that is launched: of its verify rows, then of all others.
        self._passes: list[torch.Tensor] = []
        forward = self.runner.model.forward

        def recording(*args: Any) -> torch.Tensor:
            self._passes.append(forward(*args))
            return self._passes[-1]

        self.runner.model.forward = recording  # type: ignore[method-assign]
        self.finished: dict[str, Finished] = {}

    def add(self, name: str, prompt: list[int], slot: int | None = None, **sampling: Any) -> None:
        params = SamplingParams(**{"max_tokens": 40, "seed": 11, **sampling})
        uses = (AdapterUse(f"sha-{slot}"),) if slot else ()
        request = GenerationRequest(name, tuple(prompt), params, adapters=uses)
        self.scheduler.add(request, ((slot, 1.0),) if slot else ())
        self.finished[name] = Finished(prompt)

    def run(self) -> dict[str, Finished]:
        """Step until there is no work; returns every request since the start."""
        while self.scheduler.has_work or self._launched:
            plan = self.scheduler.plan(0.0)
            if not plan.is_empty:
                self._passes = []
                self._launched.append((plan, self.runner.launch(plan), self._passes))
            while len(self._launched) > (0 if plan.is_empty else self._run_ahead):
                self._take_in(*self._launched.popleft())
        return self.finished

    def _take_in(self, plan: BatchPlan, pending: PendingStep, passes: list[torch.Tensor]) -> None:
        result = pending.wait()
        logits: dict[int, list[torch.Tensor]] = {}
        if plan.verify_rows:
            lines_RNV = passes[0].unflatten(0, (len(plan.verify_rows), -1))
            logits |= {row.sequence_id: list(lines_RNV[i]) for i, row in enumerate(result.verified)}
        logits |= {row.sequence_id: [passes[-1][i]] for i, row in enumerate(result.rows)}
        sequence_ids = {s.request.request_id: s.sequence_id for s in self.scheduler.running}
        for event in self.scheduler.commit(plan, result):
            assert event.row is not None, event.error
            into = self.finished[event.request_id]
            into.drawn.append(event.row.token_id)
            into.logprobs.append(event.row.logprob)
            into.logits.append(logits[sequence_ids[event.request_id]].pop(0))
            if event.is_first:
                into.num_cached_tokens = event.num_cached_tokens


def check(finished: Finished, oracle: Any, num_drawn: int = 40) -> None:
    assert len(finished.drawn) == num_drawn
    with torch.no_grad():
        expected = oracle(torch.tensor([finished.prompt + finished.drawn])).logits[0]
    expected = expected[len(finished.prompt) - 1 : -1]
    assert relative_error(torch.stack(finished.logits), expected) < TOLERANCE
    drawn = torch.tensor(finished.drawn)[:, None]
    logprobs = expected.log_softmax(-1).gather(1, drawn)[:, 0].tolist()
    assert finished.logprobs == pytest.approx(logprobs, abs=1e-3)


@pytest.fixture(scope="module", params=["tied", "deltanet_16_16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"scheduled_{request.param}")
    make_checkpoint(folder, seed=6, **SHAPES[request.param])
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return hf_model(folder)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_requests_that_share_steps_match(folder: Path, oracle: Any, run_ahead: int):
    engine = ScheduledEngine(folder, run_ahead=run_ahead)
    lengths = [1, 15, 16, 17, 90, 130, 33, 48]  # more than may run at once, some in several chunks
    for i, length in enumerate(lengths):
        engine.add(f"r{i}", token_ids(length, seed=20 + i), seed=i)
    for finished in engine.run().values():
        check(finished, oracle)


def test_a_prefix_hit_matches(folder: Path, oracle: Any):
    engine = ScheduledEngine(folder)
    shared = token_ids(40, seed=40)
    engine.add("first", shared + token_ids(39, seed=41))
    engine.run()
    engine.add("again", shared + token_ids(39, seed=41))
    engine.add("branch", shared + token_ids(25, seed=42))
    engine.run()
    engine.add("second branch", shared + token_ids(12, seed=43))
    engine.run()
    for finished in engine.finished.values():
        check(finished, oracle)
    cached = {name: finished.num_cached_tokens for name, finished in engine.finished.items()}
    # Where the prompts part there is no checkpoint until the first branch has come by.
    assert cached == {"first": 0, "again": 64, "branch": 0, "second branch": 32}


def test_a_damaged_checkpoint_shows_after_a_hit(folder: Path, oracle: Any):
    engine = ScheduledEngine(folder)
    prompt = token_ids(79, seed=44)
    engine.add("first", prompt)
    engine.run()
    states = engine.runner.states
    for index in range(engine.runner.config.num_linear_layers):
        states.layer(index).state_SHKV.zero_()
    engine.add("again", prompt)
    again = engine.run()["again"]
    assert again.num_cached_tokens > 0
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt + again.drawn])).logits[0]
    assert relative_error(torch.stack(again.logits), expected[len(prompt) - 1 : -1]) > 1e-2


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_preempted_requests_match(folder: Path, oracle: Any, run_ahead: int):
    """Pages for about two of the four: the later ones give way and resume."""
    engine = ScheduledEngine(folder, num_pages=16, run_ahead=run_ahead)
    for i in range(4):
        engine.add(f"r{i}", token_ids(50 + 7 * i, seed=50 + i), seed=i)
    finished = engine.run()
    assert engine.scheduler.counters.num_preemptions > 0
    for one in finished.values():
        check(one, oracle)


def test_a_seeded_answer_is_the_same_alone_and_in_company(folder: Path):
    def answer(company: int) -> list[int]:
        engine = ScheduledEngine(folder)
        for i in range(company):
            engine.add(f"other{i}", token_ids(30 + i, seed=60 + i), seed=1000 + i)
        engine.add("it", token_ids(37, seed=59), seed=77, top_p=0.95, temperature=0.9)
        return engine.run()["it"].drawn

    assert answer(0) == answer(5)
    assert answer(0) == answer(0)


def test_running_ahead_changes_no_answer(folder: Path):
    """Greedy, seeded and penalised requests, with stops found one step late, and their next turns."""

    def answers(run_ahead: int) -> dict[str, list[int]]:
        engine = ScheduledEngine(folder, run_ahead=run_ahead)
        kinds = [{"temperature": 0.0}, {"top_p": 0.9}, {"repetition_penalty": 1.2}, {"top_k": 20}]
        for i, kind in enumerate(kinds * 2):
            stops = frozenset(range(i % 3, 300, 37))
            engine.add(f"r{i}", token_ids(20 + 9 * i, seed=90 + i), seed=i, stop_token_ids=stops, **kind)
        first = dict(engine.run())
        for name, finished in first.items():
            engine.add(f"{name} next", finished.prompt + finished.drawn + token_ids(5, seed=99), max_tokens=9)
        return {name: finished.drawn for name, finished in engine.run().items()}

    in_turn, ahead = answers(0), answers(1)
    assert ahead == in_turn
    assert any(len(drawn) < 40 for name, drawn in in_turn.items() if "next" not in name)


def test_adapters_in_company_match_peft(folder: Path, oracle: Any):
    engine = ScheduledEngine(folder)
    loras = {slot: random_lora(engine.runner.config, rank=2 + slot, seed=slot) for slot in (1, 2)}
    for slot, lora in loras.items():
        config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
        engine.runner.adapters.stage(slot, adapter_bytes, config_json)
        engine.runner.adapters.activate(slot)
    prompt = token_ids(45, seed=70)
    for slot in (None, 1, 2):
        engine.add(f"s{slot}", prompt, slot)
    first = engine.run()
    for slot in (None, 1, 2):
        engine.add(f"s{slot} again", prompt, slot)  # each hits the prefix of its own adapter
    finished = {**first, **engine.run()}
    for slot in (None, 1, 2):
        model = oracle if slot is None else peft_model_with(loras[slot], hf_model(folder))
        for name in (f"s{slot}", f"s{slot} again"):
            check(finished[name], model)
        assert finished[f"s{slot} again"].num_cached_tokens == 32
    assert finished["s1"].drawn != finished["sNone"].drawn != finished["s2"].drawn


def test_sampled_log_probabilities_of_greedy_requests_are_zero(folder: Path):
    engine = ScheduledEngine(folder)
    engine.add("greedy", token_ids(20), temperature=0.0, max_tokens=5)
    plan = engine.scheduler.plan(0.0)
    row = engine.runner.launch(plan).wait().rows[0]
    assert row.sampled_logprob == 0.0
    assert row.logprob < 0.0
    assert math.isfinite(row.logprob)


def test_a_request_whose_adapter_overflows_ends_with_an_error_and_no_other_does(folder: Path, oracle: Any):
    engine = ScheduledEngine(folder)
    lora = random_lora(engine.runner.config, rank=2)
    for a, b in lora.tensors().values():
        a.fill_(3e38)
        b.fill_(3e38)
    config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
    engine.runner.adapters.stage(1, adapter_bytes, config_json)
    engine.runner.adapters.activate(1)
    engine.add("good", token_ids(30, seed=80))
    engine.add("bad", token_ids(30, seed=81), 1)
    plan = engine.scheduler.plan(0.0)
    events = engine.scheduler.commit(plan, engine.runner.launch(plan).wait())
    failed = [event for event in events if event.error is not None]
    assert [(event.request_id, event.error.code) for event in failed] == [("bad", "non_finite_logits")]
    assert engine.scheduler.stats().num_running == 1
    # What the failed request left behind is handed out again.
    engine.add("after", token_ids(30, seed=82))
    check(engine.run()["after"], oracle)
