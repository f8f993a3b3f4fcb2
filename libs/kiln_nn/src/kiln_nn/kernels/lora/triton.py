"""LoRA for every token of a step in two Triton launches a linear layer, whatever adapters they use.

Source: grouped shrink and expand as in Punica (Chen et al. 2023, arXiv 2310.18547) and S-LoRA
(Sheng et al. 2023, arXiv 2311.03285), here over tiles of tokens with the same adapters: all modules
that read one x in one launch, several adapters of a token summed in a register, no atomics.

Takes x, A and B in one of bfloat16, float16 and float32, y in any of them with any row stride, tiles
of 16 tokens or a larger power of two, one to four modules, any rank. Only what an adapter's rank
covers is read. Sums are float32; `A x` is rounded to the format of B before the second product, y
once.

Error of what is added against the float64 reference (relative, norm-wise) at the 4B shapes on an
H200: 1.7e-3 in bfloat16; 1.1e-7 in float32 in the interpreter. Time there with 8 adapters of rank 16, added to all 128
fused layers of a step (benchmarks/kernels/lora.py): 0.98 ms at batch 64 and 1.79 at 256, 0.55 for one
adapter at 64, against 0.21 ms for the bytes. What decides are pieces (1,024 inputs: fewer sums to add
up) and how many programs of expand lie beside the base product's (two warps each).

Legend: `T` tokens, `I` inputs, `O` outputs, `S` adapters in the tables, `R` the tables' rank, `Q`
rows of A, `E` entries, `N` modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kiln_nn.kernels.dependent_launch import launch_options, supports_dependent_launch
from kiln_nn.kernels.dispatch import is_interpreted
from kiln_nn.kernels.lora.rows import DECODE_TILE_TOKENS, LoraRows
from kiln_nn.kernels.lora.triton_kernels import expand_kernel, shrink_few_kernel, shrink_many_kernel

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_MODULES = 4


@dataclass(frozen=True)
class LoraConfig:
    """How the two launches are cut.

    `inputs`: of x and A that a program holds at a time. `blocks_per_piece`: such blocks that one
    program sums; None for all at once, which needs tiles of few tokens. `outputs`: a program's
    columns of B and y.
    """

    inputs: int
    outputs: int
    blocks_per_piece: int | None = None
    shrink_warps: int = 4
    expand_warps: int = 4
    stages: int = 3

    def num_pieces(self, num_inputs: int) -> int:
        return triton.cdiv(num_inputs, self.inputs * (self.blocks_per_piece or 1))


def choose(
    tile_tokens: int, num_inputs: int, num_outputs: int, num_modules: int, num_tiles: int
) -> LoraConfig:
    """Pieces that fit the registers with few tokens; with many only as many as occupy the GPU."""
    if tile_tokens == DECODE_TILE_TOKENS:
        widest = max(64, min(1024, triton.next_power_of_2(num_inputs)))
        return LoraConfig(widest, 128 if num_outputs > 4096 else 64, expand_warps=2)
    num_blocks = triton.cdiv(num_inputs, 64)
    pieces = min(8, num_blocks, max(1, 256 // max(1, num_tiles * num_modules)))
    return LoraConfig(64, 128, triton.cdiv(num_blocks, pieces))


@dataclass(frozen=True)
class Shrunk:
    """`A x` of every entry as partial sums, and the cut they were made with.

    `h`: `[E, N, blocks of 16 ranks, tokens of a tile, 16, pieces]` in float32, in room for a power of two.
    """

    h: torch.Tensor
    config: LoraConfig


def supports_inputs(x_TI: torch.Tensor, a_SQI: torch.Tensor, num_modules: int) -> bool:
    """Whether `shrink` was written for these formats and strides."""
    return (
        num_modules <= _MOST_MODULES
        and x_TI.dtype in _FLOATS
        and x_TI.dtype == a_SQI.dtype
        and x_TI.stride(-1) == a_SQI.stride(-1) == 1
    )


def supports(
    y_TO: torch.Tensor, x_TI: torch.Tensor, a_SQI: torch.Tensor, b_SRO: torch.Tensor, num_modules: int
) -> bool:
    """Whether formats and strides are within what the kernels were written for."""
    return (
        supports_inputs(x_TI, a_SQI, num_modules)
        and b_SRO.dtype == x_TI.dtype
        and y_TO.dtype in _FLOATS
        and y_TO.stride(-1) == b_SRO.stride(-1) == 1
    )


def lora_add_(
    y_TO: torch.Tensor,
    x_TI: torch.Tensor,
    a_SQI: torch.Tensor,
    b_SRO: torch.Tensor,
    rows: LoraRows,
    module_bounds: Sequence[int],
    config: LoraConfig | None = None,
    *,
    shrunk: Shrunk | None = None,
) -> None:
    """Two launches, or one; the arguments are those of the package's public function and within `supports`."""
    if rows.shape.num_entries == 0:
        return
    num_modules = len(module_bounds) - 1
    if shrunk is not None:
        expand_(y_TO, b_SRO, shrunk, rows, module_bounds, is_shrunk_early=True)
        return
    config = config or choose(
        rows.shape.tile_tokens, x_TI.shape[1], y_TO.shape[1], num_modules, rows.shape.num_tiles
    )
    expand_(y_TO, b_SRO, shrink(x_TI, a_SQI, rows, num_modules, config), rows, module_bounds)


def shrink(
    x_TI: torch.Tensor, a_SQI: torch.Tensor, rows: LoraRows, num_modules: int, config: LoraConfig
) -> Shrunk:
    """The first launch."""
    shape, num_inputs = rows.shape, x_TI.shape[1]
    table_rank = a_SQI.shape[1] // num_modules
    num_pieces, rank_blocks = config.num_pieces(num_inputs), triton.cdiv(table_rank, 16)
    piece_room = triton.next_power_of_2(num_pieces)
    h = torch.empty(
        (shape.num_entries, num_modules, rank_blocks, shape.tile_tokens, 16, piece_room),
        dtype=torch.float32,
        device=x_TI.device,
    )
    own: dict[str, Any]
    if config.blocks_per_piece is None:
        kernel, own = shrink_few_kernel, {"WAYS": config.shrink_warps}
    else:
        kernel = shrink_many_kernel
        own = {"BLOCKS_PER_PIECE": config.blocks_per_piece, "STAGES": config.stages}
    kernel[(num_modules * num_pieces, shape.num_entries)](
        x_TI,
        a_SQI,
        h,
        rows.adapters_E,
        rows.ranks_E,
        rows.entries_E2M,
        num_inputs,
        x_TI.stride(0),
        a_SQI.stride(0),
        a_SQI.stride(1),
        NUM_MODULES=num_modules,
        NUM_PIECES=num_pieces,
        PIECE_ROOM=piece_room,
        TABLE_RANK=table_rank,
        RANK_BLOCKS=rank_blocks,
        TOKENS=shape.tile_tokens,
        INPUTS=config.inputs,
        INTERPRETED=is_interpreted(),
        num_warps=config.shrink_warps,
        num_stages=1,
        **own,
        **launch_options(supports_dependent_launch(x_TI.device)),
    )
    return Shrunk(h[..., :num_pieces], config)


def expand_(
    y_TO: torch.Tensor,
    b_SRO: torch.Tensor,
    shrunk: Shrunk,
    rows: LoraRows,
    module_bounds: Sequence[int],
    *,
    is_shrunk_early: bool = False,
) -> None:
    """`y += B h`, each token's adapters one after the other.

    With `is_shrunk_early` the sums were complete before the kernel that made y let this one start.
    """
    h, config = shrunk.h, shrunk.config
    shape, (_, num_modules, rank_blocks, _, _, num_pieces) = rows.shape, h.shape
    ends = [*module_bounds[1:], *[module_bounds[-1]] * (_MOST_MODULES - num_modules)]
    widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    expand_kernel[(sum(triton.cdiv(width, config.outputs) for width in widths), shape.num_tiles)](
        y_TO,
        b_SRO,
        h,
        rows.tiles_B4,
        rows.tokens_BM,
        rows.adapters_E,
        rows.ranks_E,
        rows.entries_E2M,
        *ends,
        y_TO.stride(0),
        b_SRO.stride(0),
        b_SRO.stride(1),
        NUM_MODULES=num_modules,
        NUM_PIECES=num_pieces,
        PIECE_ROOM=h.stride(-2),
        RANK_BLOCKS=rank_blocks,
        TOKENS=shape.tile_tokens,
        OUTPUTS=config.outputs,
        ALIGNED=all(end % 16 == 0 for end in ends),
        EARLY=is_shrunk_early,
        INTERPRETED=is_interpreted(),
        num_warps=config.expand_warps,
        num_stages=1,
        **launch_options(supports_dependent_launch(y_TO.device)),
    )
