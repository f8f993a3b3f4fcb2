"""An fp8 engine whose attention and DeltaNet round what they make: its output projections read that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_engine.domain import AdapterUse, GenerationRequest, SamplingParams
from kiln_nn.kernels.linear import LinearConfig, quantised
from kiln_nn.kernels.linear.config import LinearKind
from kiln_nn.kernels.quantised import RoundedRows
from tests.support.engine_plans import token_ids
from tests.support.engine_serving import KERNEL_SHAPE, load_adapters, make_runner, serve
from tests.support.tiny_models import make_checkpoint
from tests.support.triton_kernels import relative_error
from tests.support.variants import SETTING

SHAPE = KERNEL_SHAPE | {
    "head_dim": 128,
    "num_attention_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
# As the 4B's output projections have it; tiny layers are in no table.
CONFIG = LinearConfig(16, 64, 128, 2, 4, 4, x_bits=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_adapters", [False, True])
def test_output_projections_read_what_was_rounded_by_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_adapters: bool
):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv(SETTING, "fp8")
    make_checkpoint(tmp_path, seed=6, **SHAPE)
    read: list[tuple[int, ...]] = []
    choose, launch = quantised.choose, quantised.launch

    def choosing(
        scheme: Any, tokens: int, outputs: int, inputs: int, kind: LinearKind, **options: Any
    ) -> Any:
        if kind is LinearKind.PARTIAL:
            return CONFIG
        return choose(scheme, tokens, outputs, inputs, kind, **options)

    def launching(x: Any, matrix: Any, out: torch.Tensor, *args: Any, **options: Any) -> None:
        launch(x, matrix, out, *args, **options)
        if isinstance(x, RoundedRows) and x.has_groups:
            read.append(tuple(x.shape))
            rows = x.dequantise(torch.float64)
            assert relative_error(rows, x.x_TI) < 4e-2
            product = rows @ matrix.dequantise(torch.float32).double().t()
            assert relative_error(out.double().sum(0), product) < 1e-3

    monkeypatch.setattr(quantised, "choose", choosing)
    monkeypatch.setattr(quantised, "launch", launching)
    runner, limits = make_runner(tmp_path, torch.bfloat16, "cuda", state_dtype=torch.bfloat16)
    uses: dict[str, Any] = {}
    slots: tuple[tuple[int, float], ...] = ()
    if with_adapters:
        load_adapters(runner)
        uses, slots = {"adapters": (AdapterUse("sha-1"),)}, ((1, 1.0),)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    requests = [
        (GenerationRequest(f"r{number}", tuple(token_ids(30 + number, seed=number)), params, **uses), slots)
        for number in range(11)
    ]
    answers = serve(runner, limits, requests, steps_between=1)
    assert all(len(answer.tokens) == 30 for answer in answers.values())
    config = runner.config
    num_layers = {kind: config.layer_types.count(kind) for kind in ("linear_attention", "full_attention")}
    # Up to eight rows of a DeltaNet are made by one launch, which rounds nothing.
    assert read.count((4, 4 * 128)) >= num_layers["full_attention"] > 0
    num_read = read.count((11, 4 * 128))
    assert num_read > 0
    assert num_read % sum(num_layers.values()) == 0
