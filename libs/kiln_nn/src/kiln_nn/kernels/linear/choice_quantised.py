"""Which tiles a linear layer over quantised weights runs with: a measured table, then a rule.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from dataclasses import replace

from kiln_nn.kernels.linear.config import (
    LinearConfig,
    LinearKind,
    RegisterConfig,
    SpecialisedConfig,
    Tiling,
    weight_rows,
)
from kiln_nn.kernels.quantised import Scheme

WEIGHT_BITS: dict[Scheme, int] = {"fp8": 8, "int4": 4}
_MULTIPROCESSORS = 132  # of the GPU that the rule was made for
_RING_BYTES = 50 * 1024  # of few tokens: four programs to a multiprocessor unpack while others wait
_WIDE_RING_BYTES = 150 * 1024  # of many tokens: one program
_MOST_TILE_TOKENS = 256
_FEW_TOKENS = 16  # beyond, x takes as much bandwidth as the weights, and larger tiles share it
# That the own kernel is chosen for: fp8's library multiplies eight bits, that of int4 whole weights.
_MOST_TOKENS: dict[Scheme, int] = {"fp8": 128, "int4": 1024}
_MOST_TOKENS_UNMEASURED = 16  # on other GPUs

# By scheme and (O, I): the configuration up to a number of tokens; None leaves it to the library, and
# so do more tokens than the last. Filled from benchmarks/kernels/quantised_linear.py and, where x is
# rounded, rounded_linear.py, which measure gate_up in the gated form: a tile's outputs are pairs of rows.
# Of int4, what a LinearConfig has for 32 and 128 tokens comes from a run with words in another order;
# the head's from 32 on are the rule's.
_GATE_UP = (18_432, 2560)
_MEASURED: dict[tuple[Scheme, tuple[int, int]], dict[int, Tiling | None]] = {
    ("int4", (12288, 2560)): {  # in_proj
        1: RegisterConfig(16, 1, 4, 2, 80),
        8: RegisterConfig(32, 1, 4, 3, 96, is_staged=True),
        16: LinearConfig(16, 64, 512, 1, 4, 2),
        32: LinearConfig(32, 64, 128, 1, 4, 8),
        64: SpecialisedConfig(64, 64, groups=2, stages=12, x_bits=8),
        128: LinearConfig(128, 64, 128, 1, 4, 2),
        256: SpecialisedConfig(128, 64, groups=3, stages=7, x_bits=8),
    },
    ("int4", (10240, 2560)): {  # qkv_proj
        1: RegisterConfig(16, 1, 4, 3, 96),
        8: RegisterConfig(32, 1, 4, 3, 96, is_staged=True),
        16: LinearConfig(16, 64, 256, 1, 4, 6),
        32: LinearConfig(32, 64, 128, 1, 4, 8),
        64: SpecialisedConfig(64, 64, groups=2, stages=12, x_bits=8),
        128: SpecialisedConfig(128, 64, groups=2, stages=5),
        256: SpecialisedConfig(128, 64, groups=3, stages=7, x_bits=8),
    },
    ("int4", (2560, 4096)): {  # out_proj
        1: RegisterConfig(16, 2, 4, 4),
        8: RegisterConfig(16, 2, 8, 2),
        16: LinearConfig(16, 64, 256, 6, 4, 6),
        32: LinearConfig(32, 64, 128, 3, 4, 8),
        64: LinearConfig(64, 64, 128, 3, 4, 4),
        128: SpecialisedConfig(64, 64, groups=2, splits=3, stages=8),
        256: LinearConfig(256, 64, 128, 3, 4, 2),
    },
    ("int4", (18432, 2560)): {  # gate_up
        8: RegisterConfig(16, 1, 4, 3, 96, is_staged=True),
        16: LinearConfig(16, 32, 256, 1, 4, 4),
        32: LinearConfig(32, 64, 128, 1, 8, 6),
        64: SpecialisedConfig(64, 32, groups=3, stages=10, x_bits=8),
        128: SpecialisedConfig(128, 32, groups=3, stages=4),
        256: SpecialisedConfig(128, 32, groups=3, stages=7, x_bits=8),
    },
    ("int4", (2560, 9216)): {  # down_proj
        1: RegisterConfig(16, 3, 4, 6),
        8: RegisterConfig(64, 9, 4, 2),
        16: RegisterConfig(64, 9, 4, 2, is_staged=True),
        32: LinearConfig(32, 64, 128, 3, 4, 8),
        64: SpecialisedConfig(64, 64, groups=2, splits=6, stages=8),
        128: SpecialisedConfig(128, 64, groups=2, splits=6, stages=5),
        256: SpecialisedConfig(128, 64, groups=2, splits=3, stages=5),
    },
    ("int4", (248320, 2560)): {  # head
        1: RegisterConfig(32, 1, 4, 5, is_staged=True),
        16: LinearConfig(16, 64, 256, 1, 4, 3),
        32: LinearConfig(32, 96, 128, 1, 8, 9),
        64: LinearConfig(64, 96, 128, 1, 8, 6),
        128: LinearConfig(128, 96, 128, 1, 8, 3),
    },
    ("fp8", (12288, 2560)): {  # in_proj
        8: LinearConfig(8, 64, 256, 1, 4, 6, 8, True),
        16: LinearConfig(16, 64, 256, 1, 4, 5, 8, True),
        32: LinearConfig(32, 96, 256, 1, 4, 5, 8, True),
        64: LinearConfig(64, 64, 128, 1, 4, 6, 8, True),
        128: LinearConfig(128, 64, 256, 1, 4, 2, 8, True),
        256: LinearConfig(128, 64, 128, 1, 4, 3, 8, True),
    },
    ("fp8", (10240, 2560)): {  # qkv_proj
        8: LinearConfig(8, 64, 256, 1, 4, 6, 8, True),
        16: LinearConfig(16, 64, 256, 1, 4, 5, 8, True),
        32: LinearConfig(32, 64, 256, 1, 4, 4, 8, True),
        64: LinearConfig(64, 64, 256, 1, 4, 3, 8, True),
    },
    ("fp8", (2560, 4096)): {  # out_proj
        8: RegisterConfig(16, 2, 4, 4, is_staged=True),
        16: LinearConfig(16, 64, 256, 3, 4, 5, 8, True),
        32: LinearConfig(32, 64, 256, 3, 4, 4, 8, True),
        64: LinearConfig(64, 64, 256, 3, 4, 3, 8, True),
        128: LinearConfig(128, 64, 256, 3, 4, 4, 8, True),
        256: LinearConfig(128, 64, 256, 3, 4, 2, 8, True),
    },
    ("fp8", (18432, 2560)): {  # gate_up
        16: LinearConfig(16, 32, 128, 1, 4, 7, 8, True),
        32: LinearConfig(32, 24, 128, 1, 4, 6, 8, True),
        64: LinearConfig(64, 24, 128, 1, 4, 4, 8, True),
    },
    ("fp8", (2560, 9216)): {  # down_proj
        8: RegisterConfig(16, 6, 4, 3),
        16: LinearConfig(16, 64, 128, 6, 4, 7, 8, True),
        32: LinearConfig(32, 64, 128, 6, 4, 6, 8, True),
        64: LinearConfig(64, 64, 256, 3, 4, 3, 8, True),
        128: LinearConfig(128, 64, 256, 3, 4, 4, 8, True),
        256: LinearConfig(128, 128, 256, 3, 4, 3, 8, False),
    },
}


def choose(
    scheme: Scheme, num_tokens: int, num_outputs: int, num_inputs: int, kind: LinearKind, *, is_hopper: bool
) -> Tiling | None:
    """The configuration for these sizes, or None where the library's product is faster.

    `num_outputs` counts the weight's rows, also for the gated form.
    """
    if not is_hopper:
        if num_tokens > _MOST_TOKENS_UNMEASURED:
            return None
        splits = _splits(num_outputs, num_inputs, 64, 128) if kind is LinearKind.PARTIAL else 1
        return LinearConfig(16, 32 if kind is LinearKind.GATED else 64, 128, splits, 4, 3)
    measured = _MEASURED.get((scheme, (num_outputs, num_inputs)))
    if measured is not None:
        config = next((config for most, config in measured.items() if num_tokens <= most), None)
        if config is not None and kind is LinearKind.PLAIN and (num_outputs, num_inputs) == _GATE_UP:
            # With adapters it runs in the plain form: the same rows of weights are twice the outputs.
            return replace(config, outputs=2 * config.outputs)
        return config
    if num_tokens > _MOST_TOKENS[scheme]:
        return None
    return _by_rule(scheme, num_tokens, num_outputs, num_inputs, kind)


def invariant_config(scheme: Scheme, num_outputs: int, num_inputs: int) -> LinearConfig:
    """The one configuration that serves every number of tokens, for results that do not depend on it."""
    splits = _splits(num_outputs, num_inputs, 64, 128) if num_outputs < num_inputs else 1
    return LinearConfig(64, 64, 128, splits, 4, 4)


def _by_rule(
    scheme: Scheme, num_tokens: int, num_outputs: int, num_inputs: int, kind: LinearKind
) -> LinearConfig:
    tokens = max(8, min(_MOST_TILE_TOKENS, 1 << (num_tokens - 1).bit_length()))
    has_few, has_many = tokens <= _FEW_TOKENS, tokens == _MOST_TILE_TOKENS
    inputs = 256 if scheme == "int4" and has_few else 128
    outputs, warps = (64, 4) if has_few else (128 if has_many else 96, 8)
    if kind is LinearKind.GATED:
        outputs //= 2
    splits = 1
    if kind is LinearKind.PARTIAL and num_tokens <= _MOST_TILE_TOKENS:
        splits = _splits(num_outputs, num_inputs, outputs, inputs)
    slot_bits = inputs * (WEIGHT_BITS[scheme] * max(64, weight_rows(outputs, kind)) + 16 * tokens)
    ring_bytes = _RING_BYTES if has_few else _WIDE_RING_BYTES
    return LinearConfig(tokens, outputs, inputs, splits, warps, max(2, min(12, 8 * ring_bytes // slot_bits)))


def _splits(num_outputs: int, num_inputs: int, outputs: int, inputs: int) -> int:
    """Splits that give every multiprocessor about two tiles, none without inputs."""
    num_blocks = -(-num_inputs // inputs)
    wanted = -(-2 * _MULTIPROCESSORS // -(-num_outputs // outputs))
    blocks_of_a_split = -(-num_blocks // max(1, min(8, wanted, num_blocks // 4)))
    return -(-num_blocks // blocks_of_a_split)
