"""That the kernels of quantised weights compile without a GPU, and what their machine code has."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.linear import LinearConfig, RegisterConfig, SpecialisedConfig, invariant_config
from kiln_nn.kernels.linear.choice_quantised import choose
from kiln_nn.kernels.linear.config import LinearKind
from kiln_nn.kernels.quantised import quantise_rtn, unwritten_groups
from tests.support.hopper_compiler import boxes_of, compile_for_hopper, weights_and_x
from tests.support.quantised_linears import LAYERS, ODD, REGISTERS, SCHEMES
from tests.support.triton_kernels import SHARED_MEMORY_LIMIT, compiling_instead_of_launching, needs_triton

ONE_OF_EACH_KIND = {kind: size for size, kind in reversed(LAYERS.items())}


@needs_triton
@pytest.mark.parametrize("capability", [86, 89, 90])
def test_they_compile_for_every_supported_gpu(capability, monkeypatch):
    from kiln_nn.kernels.linear import triton_quantised
    from kiln_nn.kernels.quantised import triton as whole

    monkeypatch.setattr(whole, "supports_dependent_launch", lambda device: capability >= 90)
    with compiling_instead_of_launching((capability,)) as compiled:
        for scheme in SCHEMES:
            matrix = quantise_rtn(torch.zeros(64, 256).bfloat16(), scheme)
            x, out = torch.zeros(16, 256).bfloat16(), torch.zeros(2, 16, 64)
            for kind in LinearKind:
                options = {"is_gated": kind is LinearKind.GATED, "is_dependent": capability >= 90}
                config = choose(scheme, 16, 64, 256, kind, is_hopper=False)
                triton_quantised.launch(x, matrix, out, config, **options)
            whole.dequantise(matrix, torch.bfloat16)
        if capability >= 89:
            whole.quantise_rows(x)
            rows = unwritten_groups(x)
            whole.quantise_groups(x, rows.numbers_TI, rows.scales_GT)
    assert len(compiled) == 8 + 2 * (capability >= 89)
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[capability] for one in compiled)


def _hopper_shared_memory(
    scheme: str,
    config: LinearConfig,
    num_tokens: int,
    size: tuple[int, int],
    kind: LinearKind,
    *,
    num_beside: int = 0,
    scales: str = "*bf16",
) -> int:
    """Compile Hopper's kernel for a configuration; the bytes of shared memory of a program."""
    from kiln_nn.kernels.linear import triton_hopper_quantised as hopper

    is_four_bits, is_gated = scheme == "int4", kind is LinearKind.GATED
    kinds = {"is_gated": is_gated, "is_four_bits": is_four_bits}
    constants = hopper.constants(config, num_tokens, size[1], num_beside, **kinds)
    tensors = {
        **weights_and_x(*(("i32", 16) if is_four_bits else ("i16", 64)), constants),
        **boxes_of("bf16", 64, beside_desc=64, beside_x_desc=min(16, config.tokens)),
        "scales_ptr": scales if is_four_bits else "*fp32",
        "out_ptr": "*fp32",
        "x_ptr": "*bf16",
        "beside_ptr": "*bf16",
    }
    binary = compile_for_hopper(hopper._linear_kernel, tensors, constants, warps=config.warps)
    # Weights go from memory to registers as they are wanted there, without a way through other threads.
    assert num_beside or "shfl" not in binary.asm["ptx"]
    # One kernel for steps with and without adapters: dependents start behind the wait, or before it.
    assert binary.asm["ptx"].count("griddepcontrol.launch_dependents") == (4 if num_beside else 2)
    return binary.metadata.shared


@needs_triton
# Those of each kind that get it beside rows in bf16.
@pytest.mark.parametrize("size", [(12288, 2560), (6144, 1024), (2560, 4096)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_for_hopper_compiles(scheme, size):
    kind = LAYERS[size]
    for num_tokens in (1, 64, 256):
        config = choose(scheme, num_tokens, *size, kind, is_hopper=True)
        if isinstance(config, LinearConfig) and config.x_bits == 16:  # else see test_rounded_linear.py
            assert _hopper_shared_memory(scheme, config, num_tokens, size, kind) <= SHARED_MEMORY_LIMIT[90]
    config = invariant_config(*size, scheme)
    others = {"num_beside": 64 if kind is LinearKind.PLAIN else 0, "scales": "*fp32"}
    alone = _hopper_shared_memory(scheme, config, 1, size, kind, **others)
    assert alone <= SHARED_MEMORY_LIMIT[90]
    # Rows beside take no memory that the others have not.
    assert _hopper_shared_memory(scheme, config, 64, size, kind, **others) == alone


def _compile_specialised(
    config: SpecialisedConfig, num_tokens: int, size: tuple[int, int], kind: LinearKind, scales: str
):
    """Compile Hopper's kernel of specialised warps."""
    from kiln_nn.kernels.linear import triton_hopper_specialised as hopper

    constants = hopper.constants(config, num_tokens, size[1], is_gated=kind is LinearKind.GATED)
    pointers = {"scales_ptr": scales, "token_scales_ptr": scales, "out_ptr": "*fp32"}
    beside = boxes_of("bf16", 64, beside_desc=64, whole_x_desc=16)
    tensors = weights_and_x("i32", 16, constants) | beside | pointers
    return compile_for_hopper(hopper._linear_kernel, tensors, constants, warps=4)


@needs_triton
@pytest.mark.parametrize("kind", list(LinearKind))
def test_the_kernel_of_specialised_warps_compiles(kind):
    size = ONE_OF_EACH_KIND[kind]
    config, scales = {
        LinearKind.PLAIN: (SpecialisedConfig(64, 48, groups=3, stages=12), "*bf16"),
        LinearKind.GATED: (SpecialisedConfig(64, 32, groups=3, tiles=3, stages=12), "*bf16"),
        LinearKind.PARTIAL: (SpecialisedConfig(256, 64, groups=2, splits=4, stages=12), "*fp32"),
    }[kind]
    scale_bytes = 4 if scales == "*fp32" else 2
    config = config.fit(size[1], scale_bytes, SHARED_MEMORY_LIMIT[90])
    assert config.groups <= config.stages < 12
    binary = _compile_specialised(config, config.tokens, size, kind, scales)
    # Weights go from memory to registers as they are wanted there; a warp only asks for its own number.
    shuffles = [line for line in binary.asm["ptx"].splitlines() if "shfl" in line]
    assert all(line.endswith(", 0, 31, -1;") for line in shuffles)
    assert binary.asm["ptx"].count("griddepcontrol.launch_dependents") == 2
    planned = config.shared_memory_bytes(size[1], scale_bytes)
    assert binary.metadata.shared <= planned <= SHARED_MEMORY_LIMIT[90]
    # The groups that multiply, and four warps of which one fetches.
    assert binary.metadata.num_warps == 4 * (config.groups + 1)


def _compile_for_registers(
    scheme: str,
    config: RegisterConfig,
    num_tokens: int,
    size: tuple[int, int],
    kind: LinearKind,
    *,
    num_beside: int = 0,
    scales: str = "*bf16",
) -> str:
    """The machine code of Hopper's kernel without a ring, in PTX."""
    from kiln_nn.kernels.linear import triton_hopper_registers as hopper

    is_four_bits = scheme == "int4"
    kinds = {"is_gated": kind is LinearKind.GATED, "is_four_bits": is_four_bits}
    constants = hopper.constants(config, num_tokens, *size, num_beside, **kinds)
    tensors = {
        "x_ptr": "*bf16",
        "values_ptr": "*i32",
        "scales_ptr": scales if is_four_bits else "*fp32",
        "out_ptr": "*fp32",
        "beside_ptr": "*bf16",
    }
    binary = compile_for_hopper(hopper._linear_kernel, tensors, constants, warps=config.warps)
    assert binary.metadata.shared <= SHARED_MEMORY_LIMIT[90]
    return binary.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("kind", list(LinearKind))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_without_a_ring_compiles(scheme, kind):
    size = ONE_OF_EACH_KIND[kind]
    config = RegisterConfig(32, splits=2 if kind is LinearKind.PARTIAL else 1, warps=4, ahead=2)
    ptx = _compile_for_registers(scheme, config, 1, size, kind)
    assert ptx.count("shfl") == (4 if scheme == "int4" else 0)  # for minus eight
    weights = "ld.global.nc.L1::no_allocate.v4.b32"
    before, _ = ptx.split("griddepcontrol.wait;")
    # Of two groups and stripes, 16 rows each; all else only when x is there.
    num_fetches = 2 * 2 * 2 * (2 if kind is LinearKind.GATED else 1) * (2 if scheme == "fp8" else 1)
    assert before.count(weights) == num_fetches
    assert "mma.sync" not in before
    assert ptx.count("griddepcontrol.launch_dependents") == 2
    others = {"num_beside": 64 if kind is LinearKind.PLAIN else 0, "scales": "*fp32"}
    # All of them where rows lie beside, and of the others one that waits in either place.
    for config in list(REGISTERS.values())[:: 1 if kind is LinearKind.PLAIN else 3]:
        _compile_for_registers(scheme, config, 17, ODD, kind, **others)
