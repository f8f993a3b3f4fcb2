"""Convolution, SiLU and L2 norms for training: values and gradients against float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kiln_nn.kernels.delta_train import delta_train_heads
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
)

# One rounding of the results (and of the heads' gradients); the interpreter cuts bf16 off.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
PACKED = (0, 1, 3, 3, 40, 57)
SMALL, WIDE, RELEASED = (2, 2, 8, 16), (2, 4, 16, 8), (16, 32, 128, 128)


def _kernel():
    from kiln_nn.kernels.delta_train import triton_heads

    return triton_heads


def _positions(cu_seqlens) -> torch.Tensor:
    return torch.cat([torch.arange(end - start) for start, end in pairwise(cu_seqlens)]).int()


def _draw(shape, num_tokens: int, width: int, dtype: torch.dtype):
    num_key_heads, num_heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)
    channels = 2 * num_key_heads * key_dim + num_heads * value_dim
    mixed = torch.randn(num_tokens, channels, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(channels, width, generator=generator).to(DEVICE, dtype)
    grads = [
        torch.randn(num_tokens, *size, generator=generator).to(DEVICE, dtype)
        for size in ((num_key_heads, key_dim), (num_key_heads, key_dim), (num_heads, value_dim))
    ]
    return mixed, weight, grads


def _exact(mixed, weight, grads, shape, cu_seqlens) -> tuple[torch.Tensor, ...]:
    leaf = mixed.double().cpu().requires_grad_()
    sizes = {"num_key_heads": shape[0], "key_dim": shape[2], "value_dim": shape[3]}
    heads = delta_train_heads(leaf, weight.double().cpu(), _positions(cu_seqlens), cu_seqlens, **sizes)
    (grad,) = torch.autograd.grad(heads, leaf, [g.double().cpu() for g in grads])
    return *(x.detach() for x in heads), grad


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@on_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("shape", [SMALL, WIDE] if INTERPRETED else [SMALL, WIDE, RELEASED], ids=str)
def test_heads_and_the_inputs_gradient(shape, width, dtype, monkeypatch):
    poison_new_memory(monkeypatch)
    mixed, weight, grads = _draw(shape, PACKED[-1], width, dtype)
    wide = torch.cat((mixed, mixed), 1)[:, : mixed.shape[1]].requires_grad_()  # rows lie apart
    positions = _positions(PACKED).to(DEVICE)
    assert _kernel().supports(wide, weight, *shape[2:])
    heads = _kernel().train_heads(wide, weight, positions, shape[0], *shape[2:])
    (grad,) = torch.autograd.grad(heads, wide, grads)
    for got, want in zip((*heads, grad), _exact(mixed, weight, grads, shape, PACKED), strict=True):
        assert got.dtype == dtype
        assert relative_error(got.detach(), want) < TOLERANCE[dtype]


@on_triton
def test_a_document_that_is_not_reset_is_seen():
    mixed, weight, grads = _draw(SMALL, 40, 4, torch.float32)
    run_on = _kernel().train_heads(mixed, weight, _positions((0, 40)).to(DEVICE), 2, 8, 16)
    expected = _exact(mixed, weight, grads, SMALL, (0, 20, 40))
    assert relative_error(run_on[0][20:23], expected[0][20:23]) > 0.05


@only_outside_interpreter
@needs_triton
def test_they_compile_for_every_supported_gpu():
    mixed, weight, grads = _draw(RELEASED, 64, 4, torch.bfloat16)
    mixed.requires_grad_()
    with compiling_instead_of_launching((80, 90)) as compiled:
        heads = _kernel().train_heads(mixed, weight, _positions((0, 64)), 16, 128, 128)
        torch.autograd.grad(heads, mixed, grads)
    assert len(compiled) == 4
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability] for one in compiled)
