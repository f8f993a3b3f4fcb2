"""Which tiles a linear layer runs with, by tokens, outputs and inputs: a measured table, then a rule.

Measured on an H200 with Triton 3.6 inside a graph of all layers, where a program's ring counts
twice: what it has in flight, and what room it leaves for the next kernel to start in.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from kiln_nn.kernels.linear.config import LinearConfig, LinearKind, weight_rows

_MULTIPROCESSORS = 132  # of the measured GPU; others divide work by it just as well
_RING_BYTES = 108 * 1024  # leaves room for a second program, often the next kernel's
_NARROW_OUTPUTS = 8192  # fewer outputs do not fill a large GPU without sharing their inputs
_MOST_TOKENS = {LinearKind.PLAIN: 64, LinearKind.GATED: 32, LinearKind.PARTIAL: 128}
_MOST_TOKENS_UNMEASURED = 16  # on other GPUs

# (O, I) of Qwen3.5-4B: by most tokens, outputs and inputs of a tile, splits, warps, stages.
# Where a number of tokens is missing, the library is faster.
_IN_PROJ, _QKV_PROJ, _OUT_PROJ = (12_352, 2560), (10_240, 2560), (2560, 4096)
_GATE_UP, _DOWN, _HEAD = (18_432, 2560), (2560, 9216), (248_320, 2560)
_MEASURED: dict[tuple[int, int], dict[int, LinearConfig]] = {
    _IN_PROJ: {
        8: LinearConfig(8, 48, 128, 1, 4, 6),
        16: LinearConfig(16, 48, 64, 1, 4, 11),
        32: LinearConfig(32, 48, 64, 1, 4, 9),
        64: LinearConfig(64, 48, 64, 1, 4, 7),
        128: LinearConfig(128, 96, 64, 1, 8, 6),
    },
    _QKV_PROJ: {
        8: LinearConfig(8, 48, 128, 1, 4, 6),
        16: LinearConfig(16, 48, 64, 1, 4, 11),
        32: LinearConfig(32, 48, 128, 1, 4, 4),
        64: LinearConfig(64, 48, 64, 1, 4, 7),
    },
    _OUT_PROJ: {
        8: LinearConfig(8, 64, 256, 4, 4, 3),
        16: LinearConfig(16, 64, 128, 8, 4, 3),
        32: LinearConfig(32, 64, 128, 4, 4, 4),
        64: LinearConfig(64, 64, 64, 4, 4, 7),
    },
    _GATE_UP: {
        8: LinearConfig(8, 40, 64, 1, 4, 6),
        16: LinearConfig(16, 24, 64, 1, 4, 7),
        32: LinearConfig(32, 24, 64, 1, 4, 6),
        64: LinearConfig(64, 24, 64, 1, 4, 4),
    },
    _DOWN: {
        8: LinearConfig(8, 64, 64, 9, 4, 8),
        16: LinearConfig(16, 64, 64, 6, 4, 11),
        32: LinearConfig(32, 64, 128, 3, 4, 8),
        64: LinearConfig(64, 64, 128, 3, 4, 6),
        128: LinearConfig(128, 64, 64, 3, 4, 8),
    },
    _HEAD: {
        8: LinearConfig(8, 64, 256, 1, 4, 5),
        16: LinearConfig(16, 128, 128, 1, 4, 3),
        32: LinearConfig(32, 64, 128, 1, 4, 3),
        64: LinearConfig(64, 128, 128, 1, 8, 4),
        128: LinearConfig(128, 128, 64, 1, 8, 6),
    },
}
_KINDS = {
    _IN_PROJ: LinearKind.PLAIN,
    _QKV_PROJ: LinearKind.PLAIN,
    _HEAD: LinearKind.PLAIN,
    _GATE_UP: LinearKind.GATED,
    _OUT_PROJ: LinearKind.PARTIAL,
    _DOWN: LinearKind.PARTIAL,
}


def choose(
    num_tokens: int, num_outputs: int, num_inputs: int, kind: LinearKind, *, is_hopper: bool
) -> LinearConfig | None:
    """The configuration for these sizes, or None where the library's product is faster.

    `num_outputs` counts the weight's rows, also for the gated form.
    """
    if not is_hopper:
        if num_tokens > _MOST_TOKENS_UNMEASURED or num_inputs % 8:
            return None
        return _plain_kernel(num_outputs, num_inputs, kind)
    size = (num_outputs, num_inputs)
    if _KINDS.get(size) is kind:
        return next((config for most, config in _MEASURED[size].items() if num_tokens <= most), None)
    if num_tokens > _MOST_TOKENS[kind]:
        return None
    tokens = max(8, 1 << (num_tokens - 1).bit_length())
    return _balanced(tokens, num_outputs, num_inputs, kind)


def invariant_config(num_outputs: int, num_inputs: int) -> LinearConfig:
    """The one configuration that serves every number of tokens, for results that do not depend on it."""
    return LinearConfig(64, 64, 64, _splits(num_outputs, num_inputs), 4, 4)


def _balanced(tokens: int, num_outputs: int, num_inputs: int, kind: LinearKind) -> LinearConfig:
    """Tiles of which every multiprocessor gets about the same number; a tie goes to the larger."""
    if kind is LinearKind.PARTIAL:
        outputs, splits = 64, _splits(num_outputs, num_inputs)
    else:
        halves = 2 if kind is LinearKind.GATED else 1
        candidates = (40, 32, 24, 16) if kind is LinearKind.GATED else (64, 48, 40, 32)
        outputs = min(candidates, key=lambda tile: _most_rows(num_outputs // halves, tile))
        splits = 1
    slot_bytes = 2 * 64 * (max(64, weight_rows(outputs, kind)) + tokens)
    return LinearConfig(tokens, outputs, 64, splits, 4, max(2, _RING_BYTES // slot_bytes))


def _most_rows(num_outputs: int, tile: int) -> int:
    """Outputs of the multiprocessor that has most."""
    num_tiles = -(-num_outputs // tile)
    return -(-num_tiles // _MULTIPROCESSORS) * tile


def _splits(num_outputs: int, num_inputs: int) -> int:
    """Splits that give a narrow layer about two tiles of 64 outputs for each multiprocessor."""
    if num_outputs >= _NARROW_OUTPUTS:
        return 1
    wanted = -(-3 * _MULTIPROCESSORS // 2 // -(-num_outputs // 64))
    return max(1, min(8, wanted, num_inputs // 512))


def _plain_kernel(num_outputs: int, num_inputs: int, kind: LinearKind) -> LinearConfig:
    splits = _splits(num_outputs, num_inputs) if kind is LinearKind.PARTIAL else 1
    return LinearConfig(16, 32 if kind is LinearKind.GATED else 64, 128, splits, 4, 4)
