"""Norm, rotation and page write in one Triton launch, against the same steps in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.qk_norm_rope_write import qk_norm_rope_write, reference
from tests.support.triton_kernels import (
    CAPABILITIES,
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

# One rounding to the output's format; the interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3 if INTERPRETED else 2.5e-3}
EPS, NUM_PAGES = 1e-6, 6


def _kernel():
    from kiln_nn.kernels.qk_norm_rope_write import triton

    return triton


def _inputs(num_tokens, heads, kv_heads, head_dim, rotary_dim, page_tokens=16, dtype=torch.float32):
    """Arguments as the model makes them: q is half of [query | gate]; k and v lie side by side."""
    draw = torch.Generator().manual_seed(num_tokens)

    def random(*shape):
        return torch.randn(*shape, generator=draw).to(DEVICE, dtype)

    q = random(num_tokens, heads, 2, head_dim)[:, :, 0]
    k, v = random(num_tokens, 2 * kv_heads, head_dim).split(kv_heads, dim=1)
    positions = torch.randint(2**18, (num_tokens,), generator=draw).to(DEVICE)
    frequencies = (1e7 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)).to(DEVICE)
    slots = torch.randperm(NUM_PAGES * page_tokens, generator=draw)[:num_tokens].to(DEVICE)
    caches = [torch.full((NUM_PAGES, page_tokens, kv_heads, head_dim), 7.0).to(DEVICE, dtype) for _ in "kv"]
    return [q, k, v, random(head_dim), random(head_dim), EPS, positions, frequencies, slots, *caches]


def _in_float64(arguments):
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    exact[7] = arguments[7]  # angles are float32 numbers, their cosines and sines exact
    return (reference.qk_norm_rope_write(*exact), *exact[-2:])


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


@on_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("num_tokens", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [(1, 16, 4, 256, 64), (13, 16, 4, 256, 64), (5, 24, 4, 256, 64), (7, 4, 2, 64, 16), (3, 3, 3, 16, 16)],
)
def test_queries_and_both_caches(num_tokens, heads, kv_heads, head_dim, rotary_dim, dtype):
    arguments = _inputs(num_tokens, heads, kv_heads, head_dim, rotary_dim, dtype=dtype)
    expected = _in_float64(arguments)
    q = _kernel().qk_norm_rope_write(*arguments)
    assert q.dtype == dtype
    assert q.is_contiguous()
    assert relative_error(q, expected[0]) < TOLERANCE[dtype]
    for actual, wanted in zip(arguments[-2:], expected[1:], strict=True):
        stored, wanted_rows = (cache.flatten(0, 1)[arguments[8]] for cache in (actual, wanted))
        assert relative_error(stored, wanted_rows) < TOLERANCE[dtype]
    # Nothing else is touched: the caches' other places still hold what they held.
    for cache in arguments[-2:]:
        untouched = torch.ones(NUM_PAGES * 16, dtype=torch.bool, device=DEVICE)
        untouched[arguments[8]] = False
        assert (cache.flatten(0, 1)[untouched] == 7.0).all()


@on_triton
def test_padding_tokens_are_not_stored():
    arguments = _inputs(6, 4, 2, 64, 16)
    arguments[8][1::2] = -1
    expected = _in_float64(arguments)
    q = _kernel().qk_norm_rope_write(*arguments)
    for actual, wanted in zip((q, *arguments[-2:]), expected, strict=True):
        assert torch.allclose(actual.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    assert (arguments[-1].flatten(0, 1) != 7.0).any(-1).any(-1).sum() == 3


@on_triton
def test_angles_are_right_at_every_position():
    positions = torch.tensor([0, 1, 2, 3, 1000, 65_535, 65_537, 131_071, 200_001, 262_143], device=DEVICE)
    arguments = _inputs(len(positions), 1, 1, 64, 64)
    arguments[6] = positions
    ones, zeros = torch.ones_like(arguments[0]), torch.zeros_like(arguments[3])
    arguments[0][..., :32], arguments[0][..., 32:] = 1, 0  # q is then [cos | sin] but for its norm
    arguments[3] = zeros
    q = _kernel().qk_norm_rope_write(*arguments)
    angles = (positions.float()[:, None] * arguments[7]).double()
    expected = torch.cat((angles.cos(), angles.sin()), 1)[:, None] * ones
    assert (q.double() * 0.5**0.5 - expected).abs().max() < 2e-6


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="fp8 as the GPU converts it")
def test_an_fp8_cache_saturates():
    arguments = _inputs(2, 4, 2, 64, 16, dtype=torch.bfloat16)
    arguments[2] = torch.full_like(arguments[2], 1e4)
    arguments[2][1] = -1e4
    arguments[-2:] = [cache.to(torch.float8_e4m3fn) for cache in arguments[-2:]]
    _kernel().qk_norm_rope_write(*arguments)
    stored = arguments[-1].float().flatten(0, 1)[arguments[8]]
    assert (stored[0] == 448).all()
    assert (stored[1] == -448).all()


def test_the_reference_saturates_an_fp8_cache():
    arguments = [x.cpu() if torch.is_tensor(x) else x for x in _inputs(2, 4, 2, 64, 16)]
    arguments[2] = torch.full_like(arguments[2], 1e4)
    arguments[-2:] = [cache.to(torch.float8_e4m3fn) for cache in arguments[-2:]]
    qk_norm_rope_write(*arguments)
    assert (arguments[-1].float().flatten(0, 1)[arguments[8]] == 448).all()


@on_triton
def test_queries_and_keys_inside_one_projection():
    arguments = _inputs(5, 4, 2, 64, 16)
    expected = _in_float64(arguments)
    # Rows of [query | gate per head][keys][values], as one fused layer makes them.
    fused = torch.full((5, 4 * 2 * 64 + 2 * 2 * 64), float("nan"), device=DEVICE)
    q = fused[:, : 4 * 2 * 64].view(5, 4, 2, 64)[:, :, 0]
    k, v = fused[:, 4 * 2 * 64 :].view(5, 4, 64).split(2, dim=1)
    for inside, alone in zip((q, k, v), arguments[:3], strict=True):
        inside.copy_(alone)
    q = _kernel().qk_norm_rope_write(q, k, v, *arguments[3:])
    for actual, wanted in zip((q, *arguments[-2:]), expected, strict=True):
        assert torch.allclose(actual.double(), wanted.double(), rtol=1e-5, atol=1e-6)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="fp8 as the GPU converts it")
def test_an_fp8_cache():
    arguments = _inputs(9, 16, 4, 256, 64, dtype=torch.bfloat16)
    _, *expected = _in_float64(arguments)
    places = arguments[8]
    arguments[-2:] = [cache.to(torch.float8_e4m3fn) for cache in arguments[-2:]]
    qk_norm_rope_write(*arguments)
    for actual, wanted in zip(arguments[-2:], expected, strict=True):
        rounded = wanted.to(torch.float8_e4m3fn)
        stored = actual.float().flatten(0, 1)[places]
        # e4m3 has 3 bits of mantissa: half a step is 1/16 at most
        assert relative_error(stored, wanted.flatten(0, 1)[places]) < 0.04
        assert relative_error(stored, rounded.float().flatten(0, 1)[places]) < 0.02


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_the_public_function_chooses_the_kernel_on_a_gpu(monkeypatch):
    kernel, calls = _kernel().qk_norm_rope_write, []
    monkeypatch.setattr(_kernel(), "qk_norm_rope_write", lambda *a: (calls.append(1), kernel(*a))[1])
    qk_norm_rope_write(*_inputs(3, 4, 2, 64, 16))
    assert calls == [1]


def test_the_reference_stores_what_later_attention_reads():
    arguments = _inputs(4, 4, 2, 8, 4)
    expected = _in_float64(arguments)
    arguments = [x.cpu() if torch.is_tensor(x) else x for x in arguments]
    q = qk_norm_rope_write(*arguments)
    for actual, wanted in zip((q, *arguments[-2:]), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-6


def test_unfitting_shapes_are_refused():
    arguments = _inputs(4, 4, 2, 8, 4)
    arguments[8] = arguments[8][:3]
    with pytest.raises(ShapeMismatch, match="token_slots"):
        qk_norm_rope_write(*arguments)


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize(
    ("cache_dtype", "capabilities"), [(torch.bfloat16, CAPABILITIES), (torch.float8_e4m3fn, (89, 90))]
)
def test_it_compiles_for_every_supported_gpu(cache_dtype, capabilities):
    arguments = [
        x.cpu() if torch.is_tensor(x) else x for x in _inputs(16, 16, 4, 256, 64, dtype=torch.bfloat16)
    ]
    arguments[-2:] = [cache.to(cache_dtype) for cache in arguments[-2:]]
    assert _kernel().takes(*arguments[:5], *arguments[6:])
    with compiling_instead_of_launching(capabilities) as compiled:
        _kernel().qk_norm_rope_write(*arguments)
    assert len(compiled) == len(capabilities)
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability] for one in compiled)
