"""Linear layers in Triton against float64: odd sizes, strided inputs, poisoned outputs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.linear import (
    LinearConfig,
    invariant_config,
    linear,
    linear_partials,
    linear_swiglu,
    reference,
)
from kiln_nn.kernels.linear.choice import choose
from kiln_nn.kernels.linear.config import LinearKind, fit
from kiln_nn.kernels.rms_norm import add_rms_norm
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

# One rounding to bf16, 2^-8 at worst (the interpreter cuts off instead), or float32 sums, which
# tensor cores cut off at each step: measured 5e-6 over 4,096 inputs, 1e-5 over 9,216.
TOLERANCE = {torch.bfloat16: 5e-3 if INTERPRETED else 4e-3, torch.float32: 2e-6 if INTERPRETED else 2e-5}
SMALL = LinearConfig(16, 32, 64, splits=2, warps=4, stages=3)
TOKENS = [1, 17] if INTERPRETED else [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 41, 56, 64, 65, 88, 128]
SIZES = [(96, 192), (33, 51), (1, 8)]
if not INTERPRETED:
    SIZES += [(100, 200), (2560, 4096), (2560, 9216), (12352, 2560)]


@cache
def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().to(DEVICE)


def _kernel():
    from kiln_nn.kernels.linear import streaming

    return streaming


def _config(x: torch.Tensor, w: torch.Tensor, kind: LinearKind) -> LinearConfig:
    """A small one in the interpreter; on a GPU the chosen one, or that of any number of tokens."""
    if INTERPRETED:
        return SMALL
    is_hopper = _kernel().takes_hopper(x, w)
    return choose(len(x), *w.shape, kind, is_hopper=is_hopper) or invariant_config(*w.shape)


@pytest.fixture(params=["plain"] if INTERPRETED else ["plain", "hopper"])
def kernel(request, monkeypatch):
    """The module under test; `plain` runs the kernel of other GPUs also on Hopper."""
    if request.param == "plain":
        monkeypatch.setattr(_kernel(), "takes_hopper", lambda x, w: False)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return _kernel()


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


@on_triton
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_linear(num_tokens, size, out_dtype, kernel, poisoned):
    x, w = _draw(num_tokens, size[1]), _draw(*size, seed=1)
    config = _config(x, w, LinearKind.PLAIN)
    out = kernel.linear(x, w, config, out_dtype=out_dtype)
    assert out.shape == (num_tokens, size[0])
    assert out.dtype == out_dtype
    assert relative_error(out, x.double() @ w.double().t()) < TOLERANCE[out_dtype]


@on_triton
def test_a_given_output_is_filled(kernel):
    x, w = _draw(5, 192), _draw(96, 192, seed=1)
    out = torch.full((5, 96), float("nan"), device=DEVICE)
    assert kernel.linear(x, w, SMALL, out_dtype=torch.float32, out=out) is out
    assert relative_error(out, x.double() @ w.double().t()) < TOLERANCE[torch.float32]


@on_triton
def test_rows_that_lie_apart(kernel, poisoned):
    wide, many = _draw(5, 200), _draw(90, 128, seed=1)
    x, w = wide[:, 40:168], many[10:71]
    out = kernel.linear(x, w, SMALL)
    assert relative_error(out, x.double() @ w.double().t()) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.parametrize("size", [(2 * rows, inputs) for rows, inputs in SIZES])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_the_gated_form(num_tokens, size, kernel, poisoned):
    x, w = _draw(num_tokens, size[1]) / 8, _draw(*size, seed=1)
    out = kernel.linear_swiglu(x, w, _config(x, w, LinearKind.GATED))
    gate, up = (x.double() @ w.double().t()).chunk(2, dim=1)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, F.silu(gate) * up) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_partial_sums(num_tokens, size, kernel, poisoned):
    x, w = _draw(num_tokens, size[1]), _draw(*size, seed=1)
    config = _config(x, w, LinearKind.PARTIAL)
    out = kernel.linear_partials(x, w, config)
    assert out.dtype == torch.float32
    assert out.shape == (config.splits, num_tokens, size[0])
    assert relative_error(out.double().sum(0), x.double() @ w.double().t()) < TOLERANCE[torch.float32]


@on_triton
@pytest.mark.parametrize("num_tokens", [129] if INTERPRETED else [129, 300])
def test_many_tokens_fold_their_partial_sums_to_the_same_bits(num_tokens, kernel, poisoned):
    size = (40, 192) if INTERPRETED else (2560, 9216)
    config = SMALL if INTERPRETED else invariant_config(*size)
    x, w = _draw(num_tokens, size[1]), _draw(*size, seed=1)
    folded = kernel.linear_partials(x, w, config)
    apart = kernel.linear_partials(x[:3], w, config)
    assert folded.shape[0] == 1
    assert apart.shape[0] == config.splits > 1
    total = apart[0]
    for part in apart[1:]:
        total = total + part
    assert torch.equal(folded[0, :3], total)


@on_triton
@pytest.mark.parametrize("kind", list(LinearKind))
def test_an_invariant_row_does_not_depend_on_its_batch(kind, kernel, poisoned):
    size = (64, 192) if INTERPRETED else (2560, 4096)
    config = SMALL if INTERPRETED else invariant_config(*size)
    w = _draw(*size, seed=1)
    compute = {
        LinearKind.PLAIN: kernel.linear,
        LinearKind.GATED: kernel.linear_swiglu,
        LinearKind.PARTIAL: kernel.linear_partials,
    }[kind]
    x = _draw(70, size[1])
    alone = torch.cat([compute(row[None], w, config) for row in x[[0, 5, 69]]], dim=-2)
    for num_tokens in (6, 70):
        together = compute(x[:num_tokens], w, config)
        assert torch.equal(together[..., :6:5, :], alone[..., :2, :])
    assert torch.equal(together[..., 69, :], alone[..., 2, :])


@on_triton
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_the_norm_adds_partial_sums(num_tokens, poisoned):
    from kiln_nn.kernels.rms_norm import triton as norms

    parts = torch.randn(3, num_tokens, 96, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    residual, weight = _draw(num_tokens, 96), _draw(96, seed=1)
    out, total = norms.add_rms_norm(parts, residual, weight, 1e-6, offset=1.0)
    assert relative_error(total, parts.double().sum(0) + residual.double()) < TOLERANCE[torch.bfloat16]
    expected, same = add_rms_norm(parts.cpu(), residual.cpu(), weight.cpu(), 1e-6, offset=1.0)
    assert relative_error(total, same) < TOLERANCE[torch.bfloat16]
    assert relative_error(out, expected) < 2 * TOLERANCE[torch.bfloat16]


def test_the_norm_of_partial_sums_is_that_of_their_sum():
    parts, residual, weight = torch.randn(4, 3, 8), torch.randn(3, 8), torch.randn(8)
    out, total = add_rms_norm(parts, residual, weight, 1e-6, offset=1.0)
    expected, same = add_rms_norm(parts.sum(0), residual, weight, 1e-6, offset=1.0)
    assert torch.allclose(total, same, atol=1e-6)
    assert torch.allclose(out, expected, atol=1e-5)
    with pytest.raises(ShapeMismatch):
        add_rms_norm(parts[:, :2], residual, weight, 1e-6, offset=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_formats_and_devices_use_the_library(dtype):
    x, w = torch.randn(5, 24).to(dtype), torch.randn(14, 24).to(dtype)
    assert torch.equal(linear(x, w), F.linear(x, w))
    assert torch.equal(linear(x, w, out_dtype=torch.float32), F.linear(x, w).float())
    out = torch.empty(5, 14)
    assert linear(x, w, out_dtype=torch.float32, out=out) is out
    assert torch.equal(out, F.linear(x, w).float())
    assert torch.equal(linear_partials(x, w), F.linear(x, w)[None])
    gate, up = F.linear(x, w).chunk(2, dim=1)
    assert torch.equal(linear_swiglu(x, w), F.silu(gate) * up)
    assert linear(x[:0], w).shape == (0, 14)


def test_gradients_pass_through_the_library():
    x, w = torch.randn(5, 24, requires_grad=True), torch.randn(14, 24)
    reference.linear(x, w, out_dtype=torch.float64).sum().backward()
    assert x.grad is not None


def test_unequal_shapes_are_refused():
    x = torch.zeros(2, 3)
    for call in (linear, linear_swiglu, linear_partials):
        with pytest.raises(ShapeMismatch):
            call(x, torch.zeros(4, 5))
    with pytest.raises(ShapeMismatch):
        linear_swiglu(x, torch.zeros(5, 3))


def test_a_given_output_of_another_shape_is_refused():
    x, w = torch.zeros(8, 32), torch.zeros(16, 32)
    with pytest.raises(ShapeMismatch, match="out"):
        linear(x, w, out=torch.zeros(4, 16))


def test_stages_shrink_to_the_shared_memory():
    config = LinearConfig(64, 64, 128, stages=8)
    fitted = fit(config, LinearKind.GATED, 99 * 1024)
    assert 2 <= fitted.stages < 8
    assert fitted.shared_memory_bytes(LinearKind.GATED) <= 99 * 1024 or fitted.stages == 2


CHECKED = {
    (12352, 2560): LinearKind.PLAIN,
    (18432, 2560): LinearKind.GATED,
    (2560, 9216): LinearKind.PARTIAL,
    (2560, 4096): LinearKind.PARTIAL,
    (248320, 2560): LinearKind.PLAIN,
    (6144, 1024): LinearKind.GATED,
}


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_they_compile_for_every_supported_gpu(capability):
    from kiln_nn.kernels.linear import triton

    limit = SHARED_MEMORY_LIMIT[capability]
    with compiling_instead_of_launching((capability,)) as compiled:
        for size, kind in CHECKED.items():
            config = fit(choose(16, *size, kind, is_hopper=False), kind, limit)
            out = torch.zeros(8, 16, 64, dtype=torch.float32)
            x, w = (torch.empty(rows, size[1], dtype=torch.bfloat16) for rows in (16, size[0]))
            options = {"is_gated": kind is LinearKind.GATED, "is_dependent": capability >= 90}
            triton.launch(x, w, out, config, **options)
            triton.launch(x, w, out, fit(invariant_config(*size), kind, limit), **options, is_folded=True)
    assert len(compiled) == 2 * len(CHECKED)
    assert all(one.shared_memory_bytes <= limit for one in compiled)


def _hopper_shared_memory(
    config: LinearConfig, num_tokens: int, kind: LinearKind, *, is_folded: bool = False
) -> int:
    """Compile Hopper's kernel for a configuration; the bytes of shared memory of a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from kiln_nn.kernels.linear import triton_hopper

    kernel = triton_hopper._linear_kernel
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    constants = triton_hopper.constants(
        config, num_tokens, is_gated=kind is LinearKind.GATED, is_folded=is_folded
    )
    box, rest, x_box, x_rest = (constants[name] for name in ("BOX", "REST", "X_BOX", "X_REST"))
    rows = {"box_desc": box, "rest_desc": rest or box, "x_desc": x_box, "x_rest_desc": x_rest or x_box}
    signature = {name: f"tensordesc<bf16[{count}, 64],{layout!r}>" for name, count in rows.items()}
    signature["out_ptr"] = "*fp32"
    sizes = ("num_tokens", "num_outputs", "out_stride", "num_blocks", "split_blocks", "shows_producers")
    signature |= dict.fromkeys(sizes, "i32")
    constants |= {"DEPENDENT": True}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": config.warps, "launch_pdl": True}
    source = GluonASTSource(kernel, signature, places)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    # One kernel for steps with and without adapters: dependents start behind the wait, or before it.
    assert binary.asm["ptx"].count("griddepcontrol.launch_dependents") == 2
    return binary.metadata.shared


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize(("size", "kind"), CHECKED.items())
def test_the_kernel_for_hopper_compiles(size, kind):
    for num_tokens in (1, 24, 64, 96):
        config = choose(num_tokens, *size, kind, is_hopper=True)
        if config is not None:
            assert _hopper_shared_memory(config, num_tokens, kind) <= SHARED_MEMORY_LIMIT[90]
    folded = _hopper_shared_memory(invariant_config(*size), 1, kind, is_folded=kind is LinearKind.PARTIAL)
    assert folded <= SHARED_MEMORY_LIMIT[90]


@pytest.mark.parametrize("is_hopper", [True, False])
@pytest.mark.parametrize(("size", "kind"), CHECKED.items())
def test_every_choice_fits_its_gpu(size, kind, is_hopper):
    for num_tokens in range(1, 300):
        config = choose(num_tokens, *size, kind, is_hopper=is_hopper)
        if config is None:
            continue
        assert config.tokens >= num_tokens
        assert config.inputs % 64 == 0
        assert fit(config, kind, (227 if is_hopper else 99) * 1024) == config
        assert kind is LinearKind.PARTIAL or config.splits == 1
    assert choose(256, *size, kind, is_hopper=is_hopper) is None


@needs_triton
def test_rows_fetched_cover_the_tokens():
    from kiln_nn.kernels.linear.triton_hopper_parts import boxes, rows_fetched

    for num_tokens in range(1, 300):
        for tile in (8, 16, 32, 64, 128):
            rows = rows_fetched(num_tokens, tile)
            assert min(num_tokens, tile) <= rows <= tile
            box, rest = boxes(rows)
            assert box + rest == rows
            assert all(count & (count - 1) == 0 and count % 8 == 0 for count in (box, rest))
