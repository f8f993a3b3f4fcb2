"""Steps replayed from CUDA graphs against the same steps kernel by kernel, in float32.

Both sum in different orders where a graph is larger than its batch, so tokens agree unless a draw
falls on an edge, which the seeds here do not; log-probabilities agree within 1e-3.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from kiln_engine.domain import AdapterUse, BatchPlan, GenerationRequest, SamplingParams
from kiln_engine.domain.batch_sizes import decode_ladder
from kiln_engine.domain.output_rules import OutputRules, ThinkingRules
from kiln_engine.execution import captured_step
from kiln_engine.execution.runner import TorchRunner
from kiln_nn.kernels.compile_ahead import usable_cores
from tests.support.engine_plans import token_ids
from tests.support.engine_serving import (
    KERNEL_SHAPE,
    SlottedRequest,
    capture,
    load_adapters,
    make_runner,
    serve,
)
from tests.support.tiny_models import make_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Constrained from the sixth token on: those rows are drawn when the token before is known.
_RULES = OutputRules(thinking=ThinkingRules(7, 6, before_end_token_ids=(8,), after_end_token_ids=(9, 10)))
# Whatever the weights are rounded to, thinking ends because its budget is spent.
_NO_END_OF_ITS_OWN: dict[str, Any] = {"logit_bias": {7: -100.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_checkpoint(folder, seed=6, **KERNEL_SHAPE)
    return folder


def _requests(with_adapters: bool) -> list[SlottedRequest]:
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
        (token_ids(40, seed=11), {"rules": _RULES, **_NO_END_OF_ITS_OWN}),
        (
            shared[:144] + token_ids(5, seed=12),
            {"rules": _RULES, "num_top_logprobs": 2, **_NO_END_OF_ITS_OWN},
        ),
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


def test_the_ladder_of_batch_sizes_ends_at_the_largest():
    assert decode_ladder(1) == [1]
    assert decode_ladder(12) == [1, 2, 4, 8, 12]
    assert decode_ladder(256)[-3:] == [192, 224, 256]
    for most in range(1, 300):
        sizes = decode_ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most


def _note_launched_prompts(runner: TorchRunner, num_tokens: list[int]) -> None:
    """Append the tokens of the prompts of each pass that goes kernel by kernel."""
    launch_kernels = runner._launch_kernels

    def launching(plan: BatchPlan, step: Any) -> None:
        num_tokens.append(sum(len(chunk.token_ids) for chunk in plan.prefill_chunks))
        launch_kernels(plan, step)

    runner._launch_kernels = launching  # type: ignore[method-assign]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("with_adapters", [False, True])
def test_replayed_steps_give_what_launched_ones_give(
    folder: Path, monkeypatch: pytest.MonkeyPatch, with_adapters: bool, device: str
):
    replays: list[int] = []
    prompts_launched: list[int] = []
    replay = captured_step.CapturedStep.replay

    def counting(self: Any) -> None:
        replays.append(1)
        replay(self)

    monkeypatch.setattr(captured_step.CapturedStep, "replay", counting)
    answers = []
    for is_captured in (False, True):
        runner, limits = make_runner(folder, device=device)
        if with_adapters:
            load_adapters(runner)
        if is_captured:
            capture(runner, monkeypatch)
            _note_launched_prompts(runner, prompts_launched)
        answers.append(serve(runner, limits, _requests(with_adapters)))
        assert (len(replays) > 50) == is_captured
    # Graphs hold all prompts but those that are too long for them, with adapters too.
    assert all(num_tokens > 256 for num_tokens in prompts_launched)
    launched, replayed = answers
    for name, answer in launched.items():
        assert replayed[name].tokens == answer.tokens, name
        assert replayed[name].logprobs == pytest.approx(answer.logprobs, abs=1e-3)
        assert len(answer.rows) == 50
    for name in ("r9", "r10"):
        assert replayed[name].tokens[6:10] == [8, 7, 9, 10]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "memory", [{}, {"state_dtype": torch.bfloat16}, {"kv_dtype": torch.float8_e4m3fn}], ids=str
)
def test_narrow_formats_stay_close_to_float32(folder: Path, memory: dict[str, Any]):
    """First tokens of a prompt: later ones depend on which tokens were drawn."""
    firsts = []
    for dtype, formats in ((torch.float32, {}), (torch.bfloat16, memory)):
        runner, limits = make_runner(folder, dtype, "cuda", **formats)
        runner.capture()
        answers = serve(runner, limits, _requests(with_adapters=False))
        assert all(len(answer.rows) == 50 for answer in answers.values())
        greedy = answers["r1"]
        firsts.append((greedy.tokens[0], greedy.logprobs[0]))
    assert firsts[0][0] == firsts[1][0]
    assert firsts[0][1] == pytest.approx(firsts[1][1], abs=0.1)


def _forget_kernels() -> None:
    """Leave Triton no kernel in memory, as in a new process."""
    from triton.runtime.jit import JITFunction

    for kernel in [each for each in gc.get_objects() if isinstance(each, JITFunction)]:
        kernel.device_caches.clear()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("memory", [{}, {"max_draft_tokens": 3, "drafts_by_mtp": True}], ids=str)
def test_a_first_start_compiles_its_kernels_ahead_and_answers_as_later_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any]
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    answers = []
    for is_first in (True, False):
        _forget_kernels()
        runner, limits = make_runner(folder, torch.bfloat16, "cuda", **memory)
        with capture_logs() as logs:
            runner.capture(num_compile_threads=usable_cores())
        events = {line["event"] for line in logs}
        assert ("kernels_compiled" in events) == is_first
        assert not events & {"kernels_not_compiled_ahead", "cuda_graphs_unavailable"}
        answers.append(serve(runner, limits, _requests(with_adapters=False)))
    first, later = answers
    assert {name: answer.tokens for name, answer in first.items()} == {
        name: answer.tokens for name, answer in later.items()
    }
