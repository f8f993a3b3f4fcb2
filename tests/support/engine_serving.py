"""The real scheduler and runner on a tiny model, stepped as the loop steps them, with what each request got."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_engine.domain import FinishReason, GenerationRequest, RowResult
from kiln_engine.domain.speculation import Speculator
from kiln_engine.execution import captured_step
from kiln_engine.execution.memory_plan import MemoryRequest, plan_memory
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.scheduling import Scheduler, SchedulerLimits, check_invariants
from kiln_nn.config import ModelConfig
from kiln_nn.lora import serialize_adapter
from kiln_nn.weights.names import expected_tensors
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import read_tensors
from tests.support.variants import as_engine_holds_them

# Within what the kernels take, unlike the smaller shapes of other tests.
KERNEL_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAX_RUNNING, STEP_TOKENS, MAX_MODEL_LEN = 12, 384, 512
SlottedRequest = tuple[GenerationRequest, tuple[tuple[int, float], ...]]


@dataclass
class Answer:
    """What one request got."""

    rows: list[RowResult] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0

    @property
    def tokens(self) -> list[int]:
        return [row.token_id for row in self.rows]

    @property
    def logprobs(self) -> list[float]:
        return [row.logprob for row in self.rows]


def make_runner(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **memory: Any
) -> tuple[TorchRunner, SchedulerLimits]:
    """A runner of the folder's checkpoint, and limits that fit it; `memory` overrides the request for memory."""
    config = ModelConfig.from_folder(folder)
    numbers = {
        "page_tokens": 16,
        "max_model_len": MAX_MODEL_LEN,
        "max_running": MAX_RUNNING,
        "step_token_budget": STEP_TOKENS,
        "num_adapter_slots": 2,
        "max_adapter_rank": 8,
    }
    plan = plan_memory(config, MemoryRequest(**(numbers | memory)), dtype, free_bytes=2**32)
    specs = expected_tensors(config, include_mtp=True)
    weights = {
        name: tensor.to(device, torch.float32 if specs[name].keeps_fp32 else dtype)
        for name, tensor in read_tensors(folder).items()
    }
    limits = SchedulerLimits(
        num_pages=plan.num_pages,
        num_state_slots=plan.num_state_slots,
        max_model_len=MAX_MODEL_LEN,
        max_running=plan.max_running,
        step_token_budget=STEP_TOKENS,
        max_draft_tokens=plan.max_draft_tokens,
    )
    return TorchRunner(config, as_engine_holds_them(weights), plan), limits


def serve(
    runner: TorchRunner,
    limits: SchedulerLimits,
    requests: Iterable[SlottedRequest],
    *,
    speculator: Speculator | None = None,
    scheduler: Scheduler | None = None,
    run_ahead: int = 1,
    steps_between: int = 3,
    on_step: Callable[[int, Scheduler], None] = lambda number, scheduler: None,
) -> dict[str, Answer]:
    """Serve requests that come a few steps after each other; `on_step` is called before each step.

    Without a `scheduler` nothing is cached. With `run_ahead` 1 a step is launched before the one ahead of it is committed, where the scheduler allows.
    """
    scheduler = scheduler or Scheduler(limits, frozenset(), speculator)
    answers: dict[str, Answer] = {}
    waiting = deque(requests)
    launched: deque[Any] = deque()
    step = 0
    while waiting or scheduler.has_work or launched:
        if waiting and step % max(steps_between, 1) == 0:
            for _ in range(1 if steps_between else len(waiting)):
                request, slots = waiting.popleft()
                scheduler.add(request, slots)
                answers[request.request_id] = Answer()
        on_step(step, scheduler)
        step += 1
        plan = scheduler.plan(0.0)
        check_invariants(scheduler)
        if not plan.is_empty:
            launched.append((plan, runner.launch(plan)))
            if len(launched) == 1:
                launched[0][1].draw()
        while len(launched) > (0 if plan.is_empty else run_ahead):
            plan_of, pending = launched.popleft()
            for event in scheduler.commit(plan_of, pending.wait()):
                assert event.error is None, event.error
                answer = answers[event.request_id]
                assert answer.finish_reason is None
                answer.rows += [event.row] if event.row else []
                answer.finish_reason = event.finish_reason
                answer.num_cached_tokens += event.num_cached_tokens
            if launched:
                launched[0][1].draw()
    return answers


def load_adapters(runner: TorchRunner) -> None:
    """Random adapters in slots 1 and 2."""
    for slot in (1, 2):
        lora = random_lora(runner.config, rank=4 * slot, seed=slot)
        config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
        runner.adapters.stage(slot, adapter_bytes, config_json)
        runner.adapters.activate(slot)


class RunAgain:
    """Stands for a CUDA graph where there is no GPU: what was captured runs again at each replay.

    The references remember what they read from a step's index tensors; a graph would not.
    """

    def __init__(self, run: Callable[[], None], pool: object) -> None:
        self._run = run
        # Of a pass; drafts have none.
        self._layout = getattr(getattr(run, "func", run).__self__, "_layout", None)

    def replay(self) -> None:
        parts = () if self._layout is None else (self._layout.decode, self._layout.prefill)
        for part in parts:
            if part is not None:
                part.delta._indices.clear()
        self._run()


def capture(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture the runner's steps, on a CPU as what runs again."""
    if runner.device.type == "cpu":
        monkeypatch.setattr(captured_step, "_captured", RunAgain)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    runner.capture()
