"""Steps replayed from CUDA graphs against the same steps kernel by kernel, in float32.

Both sum in different orders where a graph is larger than its batch, so tokens agree unless a draw
falls on an edge, which the seeds here do not; log-probabilities agree within 1e-3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_engine.domain import AdapterUse, GenerationRequest, SamplingParams
from kiln_engine.domain.batch_sizes import decode_ladder
from kiln_engine.domain.output_rules import OutputRules, ThinkingRules
from kiln_engine.execution import captured_step
from kiln_engine.execution.memory_plan import MemoryRequest, plan_memory
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from kiln_nn.config import ModelConfig
from kiln_nn.lora import serialize_adapter
from kiln_nn.weights.names import expected_tensors
from tests.support.engine_plans import token_ids
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import make_checkpoint, read_tensors

# Within what the kernels take, unlike the smaller shapes of other tests.
SHAPE: dict[str, Any] = {
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
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Answer = tuple[list[int], list[float]]
# Constrained from the sixth token on: those rows are drawn when the token before is known.
_RULES = OutputRules(thinking=ThinkingRules(7, 6, before_end_token_ids=(8,), after_end_token_ids=(9, 10)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_checkpoint(folder, seed=6, **SHAPE)
    return folder


def make_runner(
    folder: Path, dtype: torch.dtype, device: str = "cuda", **memory: Any
) -> tuple[TorchRunner, SchedulerLimits]:
    config = ModelConfig.from_folder(folder)
    request = MemoryRequest(
        page_tokens=16,
        max_model_len=512,
        max_running=12,
        step_token_budget=384,
        num_adapter_slots=2,
        max_adapter_rank=8,
        **memory,
    )
    plan = plan_memory(config, request, dtype, free_bytes=2**32)
    specs = expected_tensors(config, include_mtp=True)
    weights = {
        name: tensor.to(device, torch.float32 if specs[name].keeps_fp32 else dtype)
        for name, tensor in read_tensors(folder).items()
    }
    limits = SchedulerLimits(
        num_pages=plan.num_pages,
        num_state_slots=plan.num_state_slots,
        max_model_len=512,
        max_running=12,
        step_token_budget=384,
    )
    return TorchRunner(config, weights, plan), limits


def serve(runner: TorchRunner, limits: SchedulerLimits, *, with_adapters: bool) -> dict[str, Answer]:
    """Requests of all kinds that join and leave; one step is always launched ahead."""
    scheduler = Scheduler(limits, frozenset())
    answers: dict[str, Answer] = {}
    waiting = deque(_requests(with_adapters))
    launched: deque[Any] = deque()
    step = 0
    while waiting or scheduler.has_work or launched:
        if waiting and step % 3 == 0:
            request, slots = waiting.popleft()
            scheduler.add(request, slots)
            answers[request.request_id] = ([], [])
        step += 1
        plan = scheduler.plan(0.0)
        if not plan.is_empty:
            launched.append((plan, runner.launch(plan)))
            if len(launched) == 1:
                launched[0][1].draw()
        while len(launched) > (0 if plan.is_empty else 1):
            plan_of, pending = launched.popleft()
            for event in scheduler.commit(plan_of, pending.wait()):
                assert event.row is not None, event.error
                answers[event.request_id][0].append(event.row.token_id)
                answers[event.request_id][1].append(event.row.logprob)
            if launched:
                launched[0][1].draw()
    return answers


def _requests(with_adapters: bool) -> list[tuple[GenerationRequest, tuple[tuple[int, float], ...]]]:
    shared = token_ids(150, seed=3)
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        (token_ids(20), {}),
        (shared, {"temperature": 0.0}),
        (shared[:144] + token_ids(9, seed=4), {"top_p": 0.9, "top_k": 40}),
        (token_ids(3, seed=5), {"num_top_logprobs": 3}),
        (token_ids(300, seed=6), {"repetition_penalty": 1.2, "presence_penalty": 0.5}),
        (shared[:144] + token_ids(30, seed=7), {"min_p": 0.05}),
        (token_ids(64, seed=8), {"logit_bias": {5: 4.0}}),
        (token_ids(17, seed=9), {"min_tokens": 5}),
        (token_ids(1, seed=10), {}),
        (token_ids(40, seed=11), {"rules": _RULES}),
        (shared[:144] + token_ids(5, seed=12), {"rules": _RULES, "num_top_logprobs": 2}),
    ]
    requests = []
    for number, (prompt, sampling) in enumerate(kinds):
        rules = sampling.pop("rules", None)
        params = SamplingParams(**{"max_tokens": 50, "seed": 11 + number, **sampling})
        slot = number % 3 if with_adapters else 0
        uses = (AdapterUse(f"sha-{slot}"),) if slot else ()
        request = GenerationRequest(f"r{number}", tuple(prompt), params, adapters=uses, rules=rules)
        requests.append((request, ((slot, 1.0),) if slot else ()))
    return requests


def load_adapters(runner: TorchRunner) -> None:
    for slot in (1, 2):
        lora = random_lora(runner.config, rank=4 * slot, seed=slot)
        config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
        runner.adapters.stage(slot, adapter_bytes, config_json)
        runner.adapters.activate(slot)


def test_the_ladder_of_batch_sizes_ends_at_the_largest():
    assert decode_ladder(1) == [1]
    assert decode_ladder(12) == [1, 2, 4, 8, 12]
    assert decode_ladder(256)[-3:] == [192, 224, 256]
    for most in range(1, 300):
        sizes = decode_ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most


class RunAgain:
    """Stands for a CUDA graph where there is no GPU: what was captured runs again at each replay.

    The references remember what they read from a step's index tensors; a graph would not.
    """

    def __init__(self, run: Callable[[], None], pool: object) -> None:
        self._run = run
        self._layout = getattr(run, "func", run).__self__._layout

    def replay(self) -> None:
        for part in (self._layout.decode, self._layout.prefill):
            if part is not None:
                part.delta._indices.clear()
        self._run()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("with_adapters", [False, True])
def test_replayed_steps_give_what_launched_ones_give(
    folder: Path, monkeypatch: pytest.MonkeyPatch, with_adapters: bool, device: str
):
    if device == "cpu":
        monkeypatch.setattr(captured_step, "_captured", RunAgain)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    replays: list[int] = []
    replay = captured_step.CapturedStep.replay

    def counting(self: Any, rows: Any) -> Any:
        replays.append(len(rows))
        return replay(self, rows)

    monkeypatch.setattr(captured_step.CapturedStep, "replay", counting)
    answers = []
    for is_captured in (False, True):
        runner, limits = make_runner(folder, torch.float32, device)
        if with_adapters:
            load_adapters(runner)
        if is_captured:
            runner.capture()
        answers.append(serve(runner, limits, with_adapters=with_adapters))
        assert (len(replays) > 50) == is_captured
    launched, replayed = answers
    for name, (tokens, logprobs) in launched.items():
        assert replayed[name][0] == tokens, name
        assert replayed[name][1] == pytest.approx(logprobs, abs=1e-3)
        assert len(tokens) == 50
    for name in ("r9", "r10"):
        assert replayed[name][0][6:10] == [8, 7, 9, 10]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "memory", [{}, {"state_dtype": torch.bfloat16}, {"kv_dtype": torch.float8_e4m3fn}], ids=str
)
def test_narrow_formats_stay_close_to_float32(folder: Path, memory: dict[str, Any]):
    """First tokens of a prompt: later ones depend on which tokens were drawn."""
    firsts = []
    for dtype, formats in ((torch.float32, {}), (torch.bfloat16, memory)):
        runner, limits = make_runner(folder, dtype, **formats)
        runner.capture()
        answers = serve(runner, limits, with_adapters=False)
        assert all(len(tokens) == 50 for tokens, _ in answers.values())
        tokens, logprobs = answers["r1"]  # greedy
        firsts.append((tokens[0], logprobs[0]))
    assert firsts[0][0] == firsts[1][0]
    assert firsts[0][1] == pytest.approx(firsts[1][1], abs=0.1)
