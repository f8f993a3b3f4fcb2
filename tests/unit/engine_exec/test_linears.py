"""The base model's matrices by fused path, whole and quantised."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from kiln_engine.model import linears as module
from kiln_engine.model.linears import BaseMatrices, Linears
from kiln_nn.blocks import head_weight
from kiln_nn.kernels.quantised import QuantisedMatrix, quantise_rtn, round_rows
from kiln_nn.weights.names import FUSED_GROUPS
from tests.support.tiny_models import random_tensors, tiny_config

CONFIG = tiny_config(hidden_size=128, intermediate_size=256, linear_value_head_dim=32)
STAY_WHOLE = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
PATHS = {
    f"model.layers.{index}.{name}": [f"model.layers.{index}.{part}.weight" for part in parts]
    for index, mixer in ((0, "linear_attn"), (3, "self_attn"))
    for name, parts in FUSED_GROUPS.items()
    if name.startswith((mixer, "mlp"))
}


def _quantised(tensors: dict[str, torch.Tensor], scheme: str) -> dict[str, torch.Tensor | QuantisedMatrix]:
    """Parts of a fused path back to back, as the arena holds them, quantised but for those of `STAY_WHOLE`."""
    weights = dict(tensors)
    for names in PATHS.values():
        for is_whole, run in groupby(
            names, key=lambda name: name.removesuffix(".weight").endswith(STAY_WHOLE)
        ):
            parts = list(run)
            together = torch.cat([tensors[name] for name in parts])
            matrix = together if is_whole else quantise_rtn(together, scheme)
            start = 0
            for name in parts:
                stop = start + len(tensors[name])
                is_plain = isinstance(matrix, torch.Tensor)
                weights[name] = matrix[start:stop] if is_plain else matrix.rows(start, stop)
                start = stop
    return weights


def _whole(weight: torch.Tensor | QuantisedMatrix) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantise(torch.float32)


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_quantised_parts_that_lie_back_to_back_are_one_view(scheme):
    weights = _quantised(random_tensors(CONFIG), scheme)
    base = BaseMatrices(CONFIG, weights)
    for path, names in PATHS.items():
        first, *rest = base.parts(path)
        assert isinstance(first, QuantisedMatrix)
        assert first.values.data_ptr() == weights[names[0]].values.data_ptr()
        assert first.scales.data_ptr() == weights[names[0]].scales.data_ptr()
        # b and a stay whole, and are one matrix too.
        assert [isinstance(part, torch.Tensor) for part in rest] == ([True] if "in_proj" in path else [])
        expected = torch.cat([_whole(weights[name]) for name in names])
        assert torch.equal(torch.cat([_whole(part) for part in (first, *rest)]), expected)


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_parts_of_several_kinds_make_one_output(scheme):
    weights = _quantised(random_tensors(CONFIG), scheme)
    linears = Linears(BaseMatrices(CONFIG, weights))
    x = torch.randn(5, CONFIG.hidden_size)
    for path, names in PATHS.items():
        y = linears.apply(path, x)
        expected = torch.cat([x @ _whole(weights[name]).t() for name in names], dim=1)
        assert y.is_contiguous()
        assert torch.allclose(y, expected, atol=1e-5)


def test_quantised_parts_that_lie_apart_stay_apart():
    weights = _quantised(random_tensors(CONFIG), "int4")
    name = "model.layers.0.mlp.up_proj.weight"
    matrix = weights[name]
    weights[name] = QuantisedMatrix("int4", matrix.values.clone(), matrix.scales)
    assert len(BaseMatrices(CONFIG, weights).parts("model.layers.0.mlp.gate_up_proj")) == 2


def test_the_copy_of_the_head_is_left_where_no_kernel_reads_it_as_it_is():
    weights = random_tensors(CONFIG)
    small_VD = quantise_rtn(head_weight(CONFIG, weights), "int4")
    base = BaseMatrices(CONFIG, weights, small_head_VD=small_VD)
    assert base.head(torch.zeros(4, CONFIG.hidden_size)) is small_VD
    # Stands for a GPU without kernels for this format.
    assert base.head(torch.zeros(4, CONFIG.hidden_size, device="meta")) is base.head_VD


def test_an_invariant_step_cuts_quantised_matrices_alike():
    weights = _quantised(random_tensors(CONFIG), "int4")
    base = BaseMatrices(CONFIG, weights, is_batch_invariant=True)
    (matrix,) = base.parts("model.layers.0.mlp.gate_up_proj")
    assert base.tiling(matrix).inputs % 128 == 0
    assert BaseMatrices(CONFIG, weights).tiling(matrix) is None


class _NoAdapters:
    """Stands for the adapters of a step."""

    def begin(self, path, x_TI):
        assert isinstance(x_TI, torch.Tensor)

    def finish(self, path, x_TI, y_TO, begun):
        assert isinstance(x_TI, torch.Tensor)


def test_the_form_of_a_layer_decides_whether_it_reads_rounded_rows(monkeypatch):
    """Gate and up are one kernel only without adapters; an invariant engine rounds nothing."""
    monkeypatch.setattr(
        module, "reads_rounded", lambda x_TI, parts, *, is_gated: "words" if is_gated else None
    )
    weights, x = _quantised(random_tensors(CONFIG), "fp8"), torch.zeros(5, CONFIG.hidden_size)
    base, gate_up = BaseMatrices(CONFIG, weights), "model.layers.0.mlp.gate_up_proj"
    assert Linears(base).reads_rounded(gate_up, x) == "words"
    assert Linears(base).reads_rounded("model.layers.0.linear_attn.in_proj", x) is None
    assert Linears(base, _NoAdapters()).reads_rounded(gate_up, x) is None
    invariant = Linears(BaseMatrices(CONFIG, weights, is_batch_invariant=True))
    assert invariant.reads_rounded(gate_up, x) is None


def test_adapters_read_rows_as_they_were_before_they_were_rounded():
    linears = Linears(BaseMatrices(CONFIG, _quantised(random_tensors(CONFIG), "fp8")), _NoAdapters())
    x = torch.randn(5, CONFIG.hidden_size)
    for path in PATHS:
        assert torch.equal(linears.apply(path, round_rows(x)), linears.apply(path, x))
