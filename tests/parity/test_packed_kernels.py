"""The gradient of every LoRA tensor through the trainer's own step, against float64 in plain torch.

On a GPU with every backward kernel switched on, in float32 and in bfloat16, whatever PROVEN_BACKWARD
says: `pytest tests/parity/test_packed_kernels.py -m gpu -rP` prints for each case the tensor that is
furthest off. With KILN_EACH_KERNEL=1 each kernel is tried by itself as well, which names one that is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.support.delta_inputs import relative_error
from tests.support.step_gradients import (
    KERNELS,
    RECIPES,
    StepCase,
    exact_gradients,
    gradients,
    gradients_in_process,
    rounded_gradients,
)
from tests.support.triton_kernels import needs_triton

TOLERANCE = 1e-3
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SINGLY = KERNELS if os.environ.get("KILN_EACH_KERNEL") else ()
CASES = [(recipe, "all") for recipe in RECIPES] + [("grpo", kernel) for kernel in SINGLY]
SWITCHED_ON = {"all": KERNELS} | {name: (name,) for name in KERNELS}


def on_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(needs_gpu(test))


@cache
def exact(case: StepCase) -> dict[str, torch.Tensor]:
    return exact_gradients(case)


@cache
def plain_bfloat16(case: StepCase) -> dict[str, torch.Tensor]:
    """The same step in the same format on the CPU, where plain torch computes it."""
    return rounded_gradients(case)


def errors_of(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> list[float]:
    """Relative error of each tensor; prints the worst."""
    assert actual.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    print(f"{what}: {len(errors)} tensors, mean error {mean:.1e}, worst {errors[worst]:.1e} in {worst}")
    return [*errors.values()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_float32_gradients_of_every_tensor_are_those_of_float64(recipe):
    case = StepCase(recipe, lengths=(70, 3, 64))
    assert max(errors_of(gradients(case), exact(case), recipe)) < TOLERANCE


@needs_triton
def test_so_they_are_through_all_kernels_in_the_interpreter(tmp_path):
    """All but torch's attention, which is no kernel of Triton's."""
    case = StepCase("grpo", lengths=(66, 3), is_short=True)
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = gradients_in_process(replace(case, kernels=KERNELS), tmp_path, **environment)
    assert max(errors_of(found, exact(case), "interpreter")) < 3e-5


@on_gpu
@pytest.mark.parametrize(("recipe", "kernels"), CASES)
def test_float32_gradients_on_a_gpu_are_those_of_float64(tmp_path, recipe, kernels):
    case = StepCase(recipe)
    found = gradients_in_process(replace(case, device="cuda", kernels=SWITCHED_ON[kernels]), tmp_path)
    assert max(errors_of(found, exact(case), f"{recipe}, float32, {kernels}")) < TOLERANCE


@on_gpu
@pytest.mark.parametrize(("recipe", "kernels"), CASES)
def test_bfloat16_gradients_on_a_gpu_are_as_near_as_plain_torchs(tmp_path, recipe, kernels):
    case = StepCase(recipe, "bfloat16", "bfloat16")
    found = gradients_in_process(replace(case, device="cuda", kernels=SWITCHED_ON[kernels]), tmp_path)
    errors = errors_of(found, exact(case), f"{recipe}, bfloat16, {kernels}")
    noise = errors_of(plain_bfloat16(case), exact(case), f"{recipe}, bfloat16, plain torch on the CPU")
    assert sum(errors) < 1.5 * sum(noise)
    assert max(errors) < 2.5 * max(noise)


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_documents_gradients_equal_those_it_gets_alone(tmp_path, dtype):
    packed = StepCase("grpo", dtype, dtype, "cuda", kernels=KERNELS)
    together, alone = (
        gradients_in_process(replace(packed, is_packed=is_packed), tmp_path) for is_packed in (True, False)
    )
    # bf16: products over more rows are summed in another order before they are rounded.
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    assert max(errors_of(together, alone, f"{dtype}, packed against alone")) < tolerance
