"""The gated delta rule for training: outputs and all gradients against the recurrence in float64.

Every configuration that may ever be picked is run, on the GPU and in the interpreter.
"""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.delta_train import delta_train
from kiln_nn.kernels.delta_train.reference import delta_backward, delta_forward
from kiln_nn.kernels.gated_delta import gated_delta_recurrent
from tests.support.delta_inputs import DeltaInputs, random_delta_inputs
from tests.support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    SHARED_MEMORY_LIMIT,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    poison_new_memory,
    relative_error,
    run_under_interpreter,
    starts_interpreter,
    trust_backward_kernels,
)

NAMES = ("q", "k", "v", "g", "beta")
# float32: sums of three tf32 products on a GPU. bf16: the operands of each of a chain of products are
# rounded to 8 bits, for which the written-out backward gives 4.6e-3.
TOLERANCE = {torch.float32: 5e-6 if INTERPRETED else 5e-5, torch.bfloat16: 1.5e-2}
PACKED = (0, 70, 71, 71, 135, 199)
# Key heads, value heads, K, V.
SMALL, EVEN = ((1, 2, 16, 32), (2, 2, 32, 16)) if INTERPRETED else ((1, 2, 64, 128), (2, 2, 128, 64))
RELEASED = (16, 32, 128, 128)


def _kernel():
    from kiln_nn.kernels.delta_train import triton

    return triton


def _config_keys() -> list:
    """Of all that differ; the interpreter computes none in bf16."""
    both = [] if INTERPRETED else [(torch.bfloat16, True), (torch.bfloat16, False)]
    return [(torch.float32, False), *both]


def _inputs(shape: tuple[int, int, int, int], num_tokens: int, seed: int = 0, **options) -> DeltaInputs:
    num_key_heads, num_heads, key_dim, value_dim = shape
    return random_delta_inputs(
        num_tokens,
        num_key_heads=num_key_heads,
        num_value_heads=num_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        seed=seed,
        **options,
    )


def _out_grad(inputs: DeltaInputs, seed: int = 9) -> torch.Tensor:
    return torch.randn(inputs.v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _exact(inputs, cu_seqlens, out_grad) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients of the recurrence, by autograd in float64."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in inputs]
    out, _ = gated_delta_recurrent(*leaves, cu_seqlens)
    grads = torch.autograd.grad(out, leaves, out_grad.double().cpu())
    return out.detach(), *grads


def _rounded(inputs: DeltaInputs, dtype: torch.dtype) -> list[torch.Tensor]:
    """As the kernels take them; the exact results are those of the rounded values."""
    q, k, v, g, beta = (x.to(DEVICE) for x in inputs.tensors())
    return [*(x.to(dtype) for x in (q, k, v)), g.float(), beta.float()]


def _run(arguments, cu_seqlens, out_grad, config) -> tuple[torch.Tensor, ...]:
    out, kept = _kernel().delta_forward(arguments, cu_seqlens, config)
    grads = _kernel().delta_backward(arguments, cu_seqlens, kept, out_grad, config)
    return out, *grads


def _compare(actual, expected, tolerance: float) -> None:
    errors = {
        name: relative_error(got.detach(), want)
        for name, got, want in zip(("out", *NAMES), actual, expected, strict=True)
    }
    assert max(errors.values()) < tolerance, errors


@only_outside_interpreter
@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("cu_seqlens", [(0, 1), PACKED])
def test_the_written_out_backward_equals_autograd_through_the_recurrence(cu_seqlens, chunk):
    inputs = _inputs(SMALL, cu_seqlens[-1])
    out_grad = _out_grad(inputs)
    out, _, _ = delta_forward(inputs.tensors(), cu_seqlens, chunk)
    grads = delta_backward(inputs.tensors(), cu_seqlens, out_grad, chunk)
    _compare((out, *grads), _exact(inputs.tensors(), cu_seqlens, out_grad), 1e-11)


@only_outside_interpreter
def test_the_public_function_has_all_gradients_on_the_cpu():
    inputs = _inputs(SMALL, PACKED[-1])
    out_grad = _out_grad(inputs)
    leaves = [x.clone().requires_grad_() for x in inputs.tensors()]
    out = delta_train(*leaves, PACKED)
    grads = torch.autograd.grad(out, leaves, out_grad)
    _compare((out, *grads), _exact(leaves, PACKED, out_grad), 1e-11)


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


@on_triton
@pytest.mark.parametrize("key", _config_keys(), ids=str)
@pytest.mark.parametrize("shape", [SMALL, EVEN], ids=str)
def test_every_configuration_equals_the_recurrence(key, shape, poisoned):
    inputs = _inputs(shape, PACKED[-1])
    arguments = _rounded(inputs, key[0])
    out_grad = _out_grad(inputs).to(DEVICE, key[0])
    actual = _run(arguments, PACKED, out_grad, _kernel().CONFIGS[key])
    _compare(actual, _exact(arguments, PACKED, out_grad), TOLERANCE[key[0]])


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")
@pytest.mark.parametrize("key", _config_keys(), ids=str)
def test_every_configuration_at_the_released_shape(key, poisoned):
    cu_seqlens = (0, 300, 301, 640, 1000)
    inputs = _inputs(RELEASED, cu_seqlens[-1])
    arguments = _rounded(inputs, key[0])
    out_grad = _out_grad(inputs).to(DEVICE, key[0])
    config = _kernel().CONFIGS[key]
    if key[1] and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this configuration needs more shared memory")
    actual = _run(arguments, cu_seqlens, out_grad, config)
    # The recurrence in float64 on the GPU: its states are too many for a CPU.
    leaves = [x.detach().double().requires_grad_() for x in arguments]
    out, _ = gated_delta_recurrent(*leaves, cu_seqlens)
    grads = torch.autograd.grad(out, leaves, out_grad.double())
    _compare(actual, (out.detach(), *grads), TOLERANCE[key[0]])


@on_triton
def test_a_packed_document_gets_what_it_gets_alone():
    cu_seqlens = (0, 66, 130)
    inputs = _inputs(SMALL, 130)
    out_grad = _out_grad(inputs).to(DEVICE, torch.float32)
    arguments, config = _rounded(inputs, torch.float32), _kernel().CONFIGS[torch.float32, True]
    packed = _run(arguments, cu_seqlens, out_grad, config)
    for start, end in ((0, 66), (66, 130)):
        part = [x[start:end].contiguous() for x in arguments]
        alone = _run(part, (0, end - start), out_grad[start:end].contiguous(), config)
        for whole, single in zip(packed, alone, strict=True):
            assert torch.equal(whole[start:end], single)
    joined = _run(arguments, (0, 130), out_grad, config)
    assert all(relative_error(one, other) > 1e-3 for one, other in zip(joined, packed, strict=True))


@on_triton
def test_repeated_keys_and_heads_that_forget_at_once(poisoned):
    inputs = _inputs(SMALL, 100, repeated_keys=True)
    out_grad = _out_grad(inputs).to(DEVICE, torch.float32)
    arguments, config = _rounded(inputs, torch.float32), _kernel().CONFIGS[torch.float32, True]
    actual = _run(arguments, (0, 100), out_grad, config)
    _compare(actual, _exact(arguments, (0, 100), out_grad), 10 * TOLERANCE[torch.float32])
    arguments[3] = arguments[3] * 5000
    assert all(x.isfinite().all() for x in _run(arguments, (0, 100), out_grad, config))


@on_triton
def test_the_comparison_sees_a_tile_whose_state_was_wiped():
    inputs = _inputs(SMALL, 130)
    out_grad = _out_grad(inputs).to(DEVICE, torch.float32)
    arguments, config = _rounded(inputs, torch.float32), _kernel().CONFIGS[torch.float32, True]
    out, kept = _kernel().delta_forward(arguments, (0, 130), config)
    kept.states[1].zero_()
    grads = _kernel().delta_backward(arguments, (0, 130), kept, out_grad, config)
    with pytest.raises(AssertionError):
        _compare((out, *grads), _exact(arguments, (0, 130), out_grad), 1e-2)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_the_public_function_chooses_the_kernels_on_a_gpu(monkeypatch):
    inputs = _inputs(EVEN, 80)
    leaves = [x.requires_grad_() for x in _rounded(inputs, torch.bfloat16)]
    calls = []
    trust_backward_kernels(monkeypatch)
    forward = _kernel().delta_forward
    monkeypatch.setattr(_kernel(), "delta_forward", lambda *a: (calls.append(1), forward(*a))[1])
    out = delta_train(*leaves, (0, 80))
    assert calls
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3 + [torch.float32] * 2


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_compiles_for_small_gpus_and_hopper(dtype):
    inputs = [x.float() for x in _inputs(RELEASED, 64).tensors()]
    arguments = [*(x.to(dtype) for x in inputs[:3]), *inputs[3:]]
    for capabilities, has_room in (((86,), False), ((90,), True)):
        config = _kernel().CONFIGS[dtype, has_room]
        with compiling_instead_of_launching(capabilities) as compiled:
            _run(arguments, (0, 64), arguments[2], config)
        assert len(compiled) == 8 * len(capabilities)
        for one in compiled:
            assert one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability], one


@only_outside_interpreter
@needs_triton
def test_what_the_kernels_were_not_written_for_goes_to_the_reference():
    def is_supported(shape, dtype=torch.float32) -> bool:
        q, k, v, g, beta = (x.float() for x in _inputs(shape, 1).tensors())
        return _kernel().supports(q.to(dtype), k.to(dtype), v.to(dtype), g, beta)

    assert is_supported(RELEASED, torch.bfloat16)
    assert not is_supported((1, 2, 32, 64))
    assert not is_supported((1, 2, 64, 96))
    assert not is_supported(SMALL, torch.float16)
