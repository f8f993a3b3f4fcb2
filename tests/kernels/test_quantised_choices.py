"""Which tiles are chosen for quantised weights, that they fit their GPU, and which are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kiln_nn.kernels.linear import LinearConfig, RegisterConfig, SpecialisedConfig, quantised
from kiln_nn.kernels.linear.choice_quantised import WEIGHT_BITS, choose
from kiln_nn.kernels.linear.config import LinearKind, check_rows, fit
from kiln_nn.kernels.quantised import quantise_rtn
from tests.support.quantised_linears import LAYERS, SCHEMES
from tests.support.triton_kernels import needs_triton

LIMITS = {True: 227 * 1024, False: 99 * 1024}


def _check_registers(
    config: RegisterConfig, scheme: str, num_tokens: int, size: tuple[int, int], kind: LinearKind
) -> None:
    """That x of all its tokens fits beside what waits, and that no warp of a split is without work."""
    hopper = pytest.importorskip("kiln_nn.kernels.linear.triton_hopper_registers")
    kinds = {"is_gated": kind is LinearKind.GATED, "is_four_bits": scheme == "int4"}
    constants = hopper.constants(config, num_tokens, *size, **kinds)
    assert 8 * constants["TILES"] >= min(num_tokens, 8)
    assert constants["STEPS"] * config.warps * config.splits - size[1] // 128 < config.warps * config.splits


@needs_triton
def test_what_does_not_fit_into_shared_memory_is_refused():
    hopper = pytest.importorskip("kiln_nn.kernels.linear.triton_hopper_registers")
    with pytest.raises(ValueError, match="more splits"):
        hopper.constants(RegisterConfig(16), 16, 2560, 17408 * 2, 0, is_gated=False, is_four_bits=True)


@pytest.mark.parametrize("is_hopper", [True, False])
@pytest.mark.parametrize(("size", "kind"), LAYERS.items())
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_choice_fits_its_gpu(scheme, size, kind, is_hopper):
    for num_tokens in (*range(1, 300), 1024, 4096):
        config = choose(scheme, num_tokens, *size, kind, is_hopper=is_hopper)
        assert kind is LinearKind.PARTIAL or config is None or config.splits == 1
        if isinstance(config, RegisterConfig | SpecialisedConfig):
            check_rows(config, kind)
        if isinstance(config, RegisterConfig):
            _check_registers(config, scheme, num_tokens, size, kind)
        if isinstance(config, SpecialisedConfig):
            assert scheme == "int4"
            assert is_hopper
            assert config.fit(size[1], 2, LIMITS[True]) == config
            assert config.shared_memory_bytes(size[1]) <= LIMITS[True]
        if not isinstance(config, LinearConfig):
            continue
        limit = quantised.ring_limit(quantise_rtn(torch.ones(1, 128).bfloat16(), scheme), LIMITS[is_hopper])
        assert config.inputs % 128 == 0
        assert fit(config, kind, limit, WEIGHT_BITS[scheme]) == config
        blocks = -(-size[1] // config.inputs)
        assert -(-blocks // config.splits) * (config.splits - 1) < blocks, "a split has no inputs"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gate_and_up_have_the_same_tiles_in_the_plain_form(scheme):
    """Which adapters need; measured is the gated one, whose outputs are pairs of rows."""
    for num_tokens in (1, 16, 64, 200, 512):
        gated, plain = (
            choose(scheme, num_tokens, 18432, 2560, kind, is_hopper=True)
            for kind in (LinearKind.GATED, LinearKind.PLAIN)
        )
        assert plain == (gated and replace(gated, outputs=2 * gated.outputs))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (SpecialisedConfig(64, 64), LinearKind.GATED),
        (SpecialisedConfig(64, 40), LinearKind.GATED),
        (RegisterConfig(64), LinearKind.GATED),
        (RegisterConfig(8), LinearKind.PLAIN),
        (RegisterConfig(8), LinearKind.PARTIAL),
    ],
)
def test_tiles_without_room_for_their_rows_are_refused(config, kind):
    matrix, x = quantise_rtn(torch.ones(128, 256).bfloat16(), "int4"), torch.zeros(3, 256).bfloat16()
    with pytest.raises(ValueError, match=rf"{config.outputs} outputs of the {kind.value} form .* rows"):
        quantised.launch(x, matrix, torch.zeros(1, 3, 128), config, kind)


def test_specialised_warps_that_do_not_fit_are_refused_with_numbers():
    config = SpecialisedConfig(256, 64, groups=3, tiles=3, stages=12)
    with pytest.raises(ValueError, match=r"wants \d+ bytes of shared memory for 2560 inputs"):
        config.fit(2560, 2, 227 * 1024)
