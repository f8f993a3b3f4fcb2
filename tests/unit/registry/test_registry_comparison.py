"""Norms and inner products of updates against the same from whole matrices, in float64.

Tolerance: both are float64 sums over a few hundred terms, so they agree to 1e-12 of the norms.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import save

from kiln_registry.adapter_file import AdapterFile
from kiln_registry.comparison import compare_adapters
from tests.support.registry import MODULES, lora_tensors

RTOL = 1e-12


def stored(folder, tensors, scaling=2.0):
    path = folder / f"{len([*folder.iterdir()])}.safetensors"
    path.write_bytes(save({name: torch.as_tensor(values) for name, values in tensors.items()}))
    return AdapterFile(path, scaling)


def update(tensors, path, scaling=2.0):
    prefix = f"base_model.model.{path}"
    a, b = (torch.as_tensor(tensors[f"{prefix}.lora_{side}.weight"]).double().numpy() for side in "AB")
    return scaling * b @ a


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_and_products_are_those_of_the_whole_matrices(tmp_path, dtype):
    first, second = (
        {name: torch.as_tensor(values).to(dtype) for name, values in lora_tensors(rank, rank).items()}
        for rank in (2, 3)
    )
    found = compare_adapters(stored(tmp_path, first), stored(tmp_path, second, 0.5))
    assert sorted(module.path for module in found) == sorted(MODULES)
    for module in found:
        earlier, later = update(first, module.path), update(second, module.path, 0.5)
        assert module.norm_earlier == pytest.approx(np.linalg.norm(earlier), rel=RTOL)
        assert module.norm_later == pytest.approx(np.linalg.norm(later), rel=RTOL)
        assert module.norm_change == pytest.approx(np.linalg.norm(later - earlier), rel=RTOL)
        scale = np.linalg.norm(earlier) * np.linalg.norm(later)
        assert module.inner_product == pytest.approx((earlier * later).sum(), abs=RTOL * scale)


def test_layers_of_one_adapter_alone_are_compared_with_no_change(tmp_path):
    whole, part = lora_tensors(seed=1), lora_tensors(seed=2)
    part = {name: values for name, values in part.items() if "down_proj" in name}
    found = {m.path: m for m in compare_adapters(stored(tmp_path, part), stored(tmp_path, whole))}
    gate = found["model.layers.0.mlp.gate_proj"]
    assert (gate.norm_earlier, gate.inner_product) == (0.0, 0.0)
    assert gate.norm_change == pytest.approx(gate.norm_later, rel=RTOL)
    alone = compare_adapters(None, stored(tmp_path, part))
    assert [module.path for module in alone] == ["model.layers.0.mlp.down_proj"]
    assert alone[0].norm_change == pytest.approx(alone[0].norm_later, rel=RTOL)


def test_a_tiny_change_is_not_lost_in_the_norms(tmp_path):
    """By sums of squares a change of 1e-9 of the norm would drown: 1e-18 is below float64's last digit."""
    tensors = lora_tensors(seed=1)
    nudged = stored(tmp_path, tensors, 2.0 * (1 + 1e-9))
    for module in compare_adapters(stored(tmp_path, tensors), nudged):
        assert module.norm_change == pytest.approx(1e-9 * module.norm_earlier, rel=1e-5)
        assert module.inner_product == pytest.approx(module.norm_earlier * module.norm_later, rel=RTOL)


def test_layers_come_in_the_models_order(tmp_path):
    tensors = {}
    for layer in (10, 2, 0):
        for side, shape in (("A", (1, 4)), ("B", (4, 1))):
            name = f"base_model.model.model.layers.{layer}.mlp.gate_proj.lora_{side}.weight"
            tensors[name] = np.ones(shape, np.float32)
    found = compare_adapters(None, stored(tmp_path, tensors))
    assert [module.path.split(".")[2] for module in found] == ["0", "2", "10"]
