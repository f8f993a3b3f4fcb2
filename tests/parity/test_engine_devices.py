"""The same steps in bfloat16 and on a GPU, against float32 on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kiln_engine.domain import BatchPlan, RowSampling, SamplingParams, StateCheckpoint
from kiln_engine.execution.memory_plan import MemoryRequest, plan_memory
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.execution.sampler import sample
from kiln_nn.lora import serialize_adapter
from tests.support.engine_plans import EngineRig, relative_error, token_ids
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import make_checkpoint

TOKENS = token_ids(75)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    make_checkpoint(folder, seed=12)
    return folder


def logits_of_a_mixed_run(rig: EngineRig) -> torch.Tensor:
    """Prefill in chunks, a checkpoint, a hit, decode over commits, two adapters: every logit, end to end."""
    for slot in (1, 2):
        lora = random_lora(rig.config, rank=2 * slot, seed=slot)
        config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
        rig.adapters.stage(slot, adapter_bytes, config_json)
        rig.adapters.activate(slot)
    first, second, checkpoint = rig.sequence(), rig.sequence(((1, 1.0), (2, 0.5))), rig.take_slot()
    logits = rig.step(chunks=[rig.chunk(first, TOKENS[:48], [StateCheckpoint(32, checkpoint)])])
    hit = rig.sequence()
    hit.num_computed, hit.read_slot, hit.page_ids = 32, checkpoint, first.page_ids[:2]
    logits += rig.step(
        [rig.decode(first, TOKENS[48])],
        [rig.chunk(second, TOKENS[:21]), rig.chunk(hit, TOKENS[32:41])],
    )
    for step in range(18):
        rows = [rig.decode(sequence, TOKENS[sequence.num_computed]) for sequence in (first, second, hit)]
        assert step or rows[0].position == 49
        logits += rig.step(rows)
    return torch.cat(logits)


def mean_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean over the positions of the error relative to the expected logits' length."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


def test_bfloat16_weights_stay_close_to_float32(folder: Path):
    expected = logits_of_a_mixed_run(EngineRig(folder))
    actual = logits_of_a_mixed_run(EngineRig(folder, dtype=torch.bfloat16))
    # bfloat16 has 8 bits: about 0.4 % a rounding, over some tens of roundings on the way.
    assert 1e-3 < mean_error(actual, expected) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_gpu_matches_the_cpu(folder: Path, dtype: torch.dtype, tolerance: float):
    expected = logits_of_a_mixed_run(EngineRig(folder))
    actual = logits_of_a_mixed_run(EngineRig(folder, device="cuda", dtype=dtype))
    assert mean_error(actual, expected) < tolerance
    assert dtype is not torch.float32 or relative_error(actual, expected) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_are_the_same_on_a_gpu():
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 3
    settings = [{}, {"top_k": 40}, {"top_p": 0.9, "temperature": 0.7}, {"min_p": 0.05}, {"temperature": 0.0}]
    rows = [
        RowSampling(
            SamplingParams(seed=i, num_top_logprobs=i % 3, **settings[i % 5]), i, (), (), frozenset({i})
        )
        for i in range(64)
    ]
    host, device = sample(logits, rows).wait(), sample(logits.cuda(), rows).wait()
    assert [row.token_id for row in host] == [row.token_id for row in device]
    for ours, theirs in zip(host, device, strict=True):
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-4)
        assert theirs.sampled_logprob == pytest.approx(ours.sampled_logprob, abs=1e-4)
        assert [token for token, _ in theirs.top_logprobs] == [token for token, _ in ours.top_logprobs]


ON_EACH_DEVICE = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


@ON_EACH_DEVICE
def test_steps_launched_one_on_the_other_draw_what_steps_in_turn_do(folder: Path, device: str):
    def drawn(is_ahead: bool) -> list[int]:
        rig = EngineRig(folder, device=device)
        runner = small_runner(rig, torch.float32)
        rig._slots, rig._pages = list(range(4)), list(range(32))
        sequence = rig.sequence()
        steps = [runner.launch(BatchPlan(1, prefill_chunks=(rig.chunk(sequence, TOKENS[:20]),)))]
        token_ids = [] if is_ahead else [steps[0].wait().rows[0].token_id]
        for step_id in range(2, 15):  # over a commit
            row = rig.decode(sequence, 0)
            row = dataclasses.replace(row, token_id=None if is_ahead else token_ids[-1])
            steps.append(runner.launch(BatchPlan(step_id, (row,))))
            if not is_ahead:
                token_ids.append(steps[-1].wait().rows[0].token_id)
        return [step.wait().rows[0].token_id for step in steps] if is_ahead else token_ids

    assert drawn(is_ahead=True) == drawn(is_ahead=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_runner_executes_on_a_gpu(folder: Path):
    rig = EngineRig(folder, device="cuda", dtype=torch.bfloat16)
    runner = small_runner(rig, torch.bfloat16)
    rig._slots, rig._pages = list(range(4)), list(range(32))
    chunk = rig.chunk(rig.sequence(), TOKENS[:20])
    result = runner.launch(BatchPlan(7, prefill_chunks=(chunk,))).wait()
    assert result.step_id == 7
    assert 0 <= result.rows[0].token_id < rig.config.vocab_size


def small_runner(rig: EngineRig, dtype: torch.dtype) -> TorchRunner:
    """A runner with stores of its own on the rig's weights."""
    request = MemoryRequest(
        page_tokens=16,
        max_model_len=256,
        max_running=4,
        step_token_budget=128,
        num_adapter_slots=1,
        max_adapter_rank=4,
        has_kernels=rig.model.device.type == "cuda",
    )
    memory = plan_memory(rig.config, request, dtype, free_bytes=2**30)
    runner = TorchRunner(rig.config, rig.model.weights, memory)
    assert runner.num_bytes == memory.total_bytes - memory.workspace_bytes
    return runner
