"""Training in a part of a GPU: the same numbers, and none of its work outside.

Needs a CUDA device whose driver makes green contexts (12.8 or newer); with or without MPS.
"""

from __future__ import annotations

import time

import pytest
import torch

from kiln_trainer.domain.gpu_share import EngineLoad, Shares
from kiln_trainer.torch_backend.gpu_share import GpuPartitions, LoadWatch
from tests.support.trainer_process import run_in_process
from tests.support.training import served_model, sft_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REQUEST = sft_request([[5, 201, 17, 88, 240, 3], [9, 8, 7, 6]], epochs=6, batch_tokens=8)


def partitions(shares: Shares, loads: list[EngineLoad] | None = None) -> GpuPartitions:
    """On this GPU; `loads` come one at a time, the last one for ever."""
    left = list(loads or [EngineLoad(1, 0)])

    def read_load() -> EngineLoad:
        return left.pop(0) if len(left) > 1 else left[0]

    device = torch.device("cuda", torch.cuda.current_device())
    return GpuPartitions(device, LoadWatch(read_load, shares, yield_s=0.0))


def test_losses_do_not_depend_on_the_partition_or_on_moving_between_them(tmp_path):
    with served_model(tmp_path / "model", "cuda") as served:
        expected = run_in_process(served, REQUEST, tmp_path / "whole")["losses"]
        moves = [EngineLoad(1, 0), EngineLoad(40, 0), EngineLoad(1, 0), EngineLoad(0, 0)] * 3
        seen = run_in_process(served, REQUEST, tmp_path / "parts", loads=moves)
    assert seen["gpu_sms"][0] > 0
    assert len(set(seen["gpu_sms"])) > 1
    # The library may choose other tiles for fewer multiprocessors.
    assert seen["losses"] == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_forward_and_backward_pass_stay_within_the_partition():
    """Two matrix products and their gradients take several times as long on a few multiprocessors."""
    weight = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rows = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def backward_s() -> float:
        times = []
        for _ in range(4):
            loss = (rows @ weight).sum()
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            loss.backward()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began_s)
        return min(times)

    whole_s = backward_s()
    share = partitions(Shares(light=16 / 132))
    with share.occupied():
        assert share.use.num_sms == 16
        part_s = backward_s()
    again_s = backward_s()
    assert part_s > 2.5 * whole_s
    assert again_s < 1.5 * whole_s


def test_memory_is_not_kept_once_for_each_partition():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    share = partitions(Shares(light=0.5, heavy=0.25), [EngineLoad(1, 0), EngineLoad(40, 0)] * 2)
    with share.occupied():
        for _ in range(3):
            block = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
            del block
            share.between_micro_batches()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 256 << 20
    assert torch.cuda.max_memory_reserved() < before + (2 << 30)
