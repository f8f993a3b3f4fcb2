"""Prefill chunks of a DeltaNet layer in six Triton launches.

Source: the chunked gated delta rule of gated_delta/chunked.py (Yang et al. 2024, arXiv 2406.06484
and 2412.06464), with the convolution, norms and gates in front of it and the gated norm behind.
`triton_conv` brings the step's rows into tiles of 64 tokens, `triton_tiles` computes what a tile
needs, all tiles at once, in three launches; `triton_pass` carries the states through each chunk and
writes everything that is kept; a last launch norms the outputs.

Supported: K and V powers of two from 16 to 128, any number of value heads per key head, convolution
width 2 to 4, pages of 8 to 64 tokens (a power of two, no fewer than the convolution's width), ring up
to 64 tokens, contiguous memory. State in float32 or bfloat16, ring in float32, the rest in float32 or
bfloat16. Everything else takes the reference. With float32 inputs all products are float32 (sums of
three tf32 ones); with bfloat16 ones the operands of products are bfloat16, sums float32.

Error against the float64 reference (relative, norm-wise, H200, 4B shape, bf16 throughout, half-lives
from 1 to 4,096 tokens): 4.0e-3 for prompts of 7 to 300 tokens and 5.1e-3 for one of 8,192, the larger
of outputs and states; most of it is the rounding of a dozen operands and results, 0.8e-3 to 1.7e-3
each. With float32 inputs below 2e-5.

The scratch takes 41 KB a token at the 4B shape in bf16; it is freed when the launches are queued.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kiln_nn.kernels.delta_decode import DeltaDecodeWeights, DeltaMemory
from kiln_nn.kernels.delta_prefill.chunks import TILE_TOKENS, DeltaChunks
from kiln_nn.kernels.delta_prefill.triton_conv import delta_conv_kernel
from kiln_nn.kernels.delta_prefill.triton_pass import delta_norm_kernel, delta_pass_kernel
from kiln_nn.kernels.delta_prefill.triton_tiles import (
    delta_inverses_kernel,
    delta_keys_kernel,
    delta_values_kernel,
)
from kiln_nn.kernels.dispatch import device_limits, is_interpreted

_FLOATS = (torch.float32, torch.bfloat16)
_NORM_ROWS = 32


@dataclass(frozen=True)
class PrefillConfig:
    """How the programs compute; a form is "bf16" or the precision of float32 products."""

    tile_form: str = "bf16"
    # bf16 costs the inverse no more than storing it in bf16 does, also where keys repeat.
    inverse_form: str = "bf16"
    # Heads and tokens that a program of the convolution takes.
    conv_heads: int = 4
    conv_tokens: int = 16
    conv_warps: int = 4
    keys_warps: int = 2
    values_warps: int = 4
    pass_form: str = "bf16"
    # Value columns of a state that one program of the pass carries, and its warps: the first pair
    # with which all programs run at once, or else the last.
    pass_blocks: tuple[tuple[int, int], ...] = ((64, 4), (128, 8))
    pass_stages: int = 3
    # Tiles that are looked through for checkpoints at a time.
    span: int = 256


# By format of the inputs and whether a program may have 200 KB of shared memory, or only 99.
CONFIGS = {
    (torch.bfloat16, True): PrefillConfig(),
    (torch.bfloat16, False): PrefillConfig(pass_stages=2),
    (torch.float32, True): PrefillConfig(
        "tf32x3",
        inverse_form="tf32x3",
        keys_warps=8,
        values_warps=8,
        pass_form="tf32x3",
        pass_blocks=((32, 4),),
        pass_stages=1,
    ),
    (torch.float32, False): PrefillConfig(
        "ieee",
        inverse_form="ieee",
        keys_warps=8,
        values_warps=8,
        pass_form="tf32x3",
        pass_blocks=((32, 4),),
        pass_stages=1,
    ),
}


def supports(
    memory: DeltaMemory,
    weights: DeltaDecodeWeights,
    mixed_TC: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    z_THV: torch.Tensor,
) -> bool:
    """Whether shapes, formats and strides are within what the kernels were written for."""
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    rings = (memory.ring.k_RhPK, memory.ring.u_RHPV, memory.ring.log_decay_RHP)
    stored = (memory.state_SHKV, memory.conv_rows_SQC, *rings)
    parameters = (weights.conv_CW, weights.A_log_H, weights.dt_bias_H, weights.norm_V)
    inputs = (mixed_TC, a_TH, b_TH, z_THV, memory.conv_rows_SQC)
    return (
        key_dim in (16, 32, 64, 128)
        and value_dim in (16, 32, 64, 128)
        and num_heads % num_key_heads == 0
        and 2 <= weights.conv_CW.shape[1] <= 4
        and memory.page_tokens in (8, 16, 32, 64)
        and weights.conv_CW.shape[1] <= memory.page_tokens <= capacity <= TILE_TOKENS
        and memory.state_SHKV.dtype in _FLOATS
        and all(ring.dtype is torch.float32 for ring in rings)
        and all(tensor.dtype in _FLOATS for tensor in (*parameters, *inputs))
        and mixed_TC.dtype is z_THV.dtype
        and all(tensor.is_contiguous() for tensor in (*stored, *parameters))
        and all(tensor.stride(-1) == 1 for tensor in inputs)
        and z_THV.stride(1) == value_dim
    )


def config_for(dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    """The configuration for inputs of this format."""
    return CONFIGS[dtype, device_limits(device).shared_memory_bytes >= 200 * 1024]


def invariant_config(dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    """The same, with one cut of the pass for any number of chunks."""
    config = config_for(dtype, device)
    return replace(config, pass_blocks=config.pass_blocks[:1])


@dataclass(frozen=True)
class _Tiles:
    """What the tile kernel hands to the pass, by tile number and head; time runs along the last axis.

    Tile `i` of chunk `n` is number `cu_seqlens[n] // 64 + n + i`.
    """

    q: torch.Tensor  # [tiles, h, 64, K]
    k: torch.Tensor  # [tiles, h, 64, K]
    v: torch.Tensor  # [tiles, H, 64, V]
    corrected0: torch.Tensor  # [tiles, H, V, 64]: u if the state were zero
    from_state: torch.Tensor  # [tiles, H, K, 64]: u = corrected0 + from_state S
    scores: torch.Tensor  # [tiles, H, 64, 64]: decayed k.q, column for column
    inverse: torch.Tensor  # [tiles, H, 64, 64]: U, then the inverse of I + U
    decays: torch.Tensor  # [tiles, H, 4, 64] float32: log-decay G, e^G, decay to the last boundary, beta


def _tiles(memory: DeltaMemory, num_tiles: int, dtype: torch.dtype) -> _Tiles:
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads = memory.ring.k_RhPK.shape[1]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((num_tiles, *shape), dtype=dtype, device=memory.state_SHKV.device)

    return _Tiles(
        q=empty(num_key_heads, TILE_TOKENS, key_dim),
        k=empty(num_key_heads, TILE_TOKENS, key_dim),
        v=empty(num_heads, TILE_TOKENS, value_dim),
        corrected0=empty(num_heads, value_dim, TILE_TOKENS),
        from_state=empty(num_heads, key_dim, TILE_TOKENS),
        scores=empty(num_heads, TILE_TOKENS, TILE_TOKENS),
        inverse=empty(num_heads, TILE_TOKENS, TILE_TOKENS),
        decays=empty(num_heads, 4, TILE_TOKENS, dtype=torch.float32),
    )


def delta_prefill(
    memory: DeltaMemory,
    chunks: DeltaChunks,
    weights: DeltaDecodeWeights,
    mixed_TC: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    z_THV: torch.Tensor,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Six launches; the arguments are those of the package's public function and within `supports`."""
    num_tokens, num_heads, value_dim = z_THV.shape
    config = config or config_for(mixed_TC.dtype, mixed_TC.device)
    out_THV = torch.empty(z_THV.shape, dtype=z_THV.dtype, device=z_THV.device)
    if num_tokens == 0:
        return out_THV
    tiles = _tiles(memory, num_tokens // TILE_TOKENS + chunks.num_chunks, mixed_TC.dtype)
    _launch_conv(memory, chunks, weights, mixed_TC, tiles, config)
    _launch_tiles(memory, chunks, weights, a_TH, b_TH, tiles, config)
    _launch_pass(memory, chunks, weights, mixed_TC, tiles, out_THV, config)
    num_rows = num_tokens * num_heads
    delta_norm_kernel[(-(-num_rows // _NORM_ROWS),)](
        out_THV,
        z_THV,
        weights.norm_V,
        chunks.cu_seqlens_N1,
        z_THV.stride(0),
        weights.norm_eps,
        num_rows,
        chunks.num_chunks,
        H=num_heads,
        V=value_dim,
        ROWS=_NORM_ROWS,
        num_warps=4,
    )
    return out_THV


def _shape(memory: DeltaMemory, weights: DeltaDecodeWeights) -> dict[str, int]:
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads, capacity = memory.ring.k_RhPK.shape[1:3]
    return {
        "H": num_heads,
        "HK": num_key_heads,
        "K": key_dim,
        "V": value_dim,
        "P": capacity,
        "W": weights.conv_CW.shape[1],
        "PAGE": memory.page_tokens,
    }


def _launch_conv(
    memory: DeltaMemory,
    chunks: DeltaChunks,
    weights: DeltaDecodeWeights,
    mixed_TC: torch.Tensor,
    tiles: _Tiles,
    config: PrefillConfig,
) -> None:
    shape = _shape(memory, weights)
    num_tiles = chunks.tile_chunks_B.shape[0]
    common_heads = math.gcd(shape["HK"], shape["H"])
    heads_per_program = min(config.conv_heads, common_heads & -common_heads)
    num_runs = TILE_TOKENS // config.conv_tokens
    delta_conv_kernel[((2 * shape["HK"] + shape["H"]) // heads_per_program, num_tiles * num_runs)](
        memory.conv_rows_SQC,
        chunks.cu_seqlens_N1,
        chunks.read_slots_N,
        chunks.tile_chunks_B,
        chunks.tile_starts_B,
        mixed_TC,
        weights.conv_CW,
        tiles.q,
        tiles.k,
        tiles.v,
        mixed_TC.stride(0),
        **shape,
        HEADS=heads_per_program,
        RUN=config.conv_tokens,
        num_warps=config.conv_warps,
        num_stages=1,
    )


def _launch_tiles(
    memory: DeltaMemory,
    chunks: DeltaChunks,
    weights: DeltaDecodeWeights,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    tiles: _Tiles,
    config: PrefillConfig,
) -> None:
    shape = _shape(memory, weights)
    sizes = {name: shape[name] for name in ("H", "HK", "K", "V")}
    num_tiles = chunks.tile_chunks_B.shape[0]
    # The interpreter computes all products in float32.
    form, inverse_form = ("ieee", "ieee") if is_interpreted() else (config.tile_form, config.inverse_form)
    delta_keys_kernel[(shape["HK"], num_tiles)](
        memory.ring.k_RhPK,
        memory.ring.log_decay_RHP,
        chunks.cu_seqlens_N1,
        chunks.live_slots_N,
        chunks.tile_chunks_B,
        chunks.tile_starts_B,
        a_TH,
        b_TH,
        weights.A_log_H,
        weights.dt_bias_H,
        tiles.q,
        tiles.k,
        tiles.scores,
        tiles.inverse,
        tiles.decays,
        a_TH.stride(0),
        b_TH.stride(0),
        **sizes,
        P=shape["P"],
        PAGE=shape["PAGE"],
        FORM=form,
        num_warps=config.keys_warps,
        num_stages=1,
    )
    delta_inverses_kernel[(shape["H"], num_tiles)](
        tiles.inverse,
        chunks.cu_seqlens_N1,
        chunks.tile_chunks_B,
        chunks.tile_starts_B,
        H=shape["H"],
        FORM=inverse_form,
        num_warps=1,
        num_stages=1,
    )
    delta_values_kernel[(shape["H"], num_tiles)](
        chunks.cu_seqlens_N1,
        chunks.tile_chunks_B,
        chunks.tile_starts_B,
        tiles.k,
        tiles.v,
        tiles.corrected0,
        tiles.from_state,
        tiles.inverse,
        tiles.decays,
        **sizes,
        FORM=form,
        num_warps=config.values_warps,
        num_stages=1,
    )


def _blocks_of(tiles: torch.Tensor, num_rows: int) -> TensorDescriptor:
    """A descriptor of rows over all tiles and heads, read `num_rows` whole rows at a time."""
    rows = tiles.view(-1, tiles.shape[-1])
    return TensorDescriptor.from_tensor(rows, [num_rows, rows.shape[1]])


def _pass_block(memory: DeltaMemory, num_chunks: int, config: PrefillConfig) -> tuple[int, int]:
    _, num_heads, _, value_dim = memory.state_SHKV.shape
    num_multiprocessors = device_limits(memory.state_SHKV.device).num_multiprocessors
    num_columns = num_chunks * num_heads * value_dim
    at_once = (pair for pair in config.pass_blocks if num_columns <= num_multiprocessors * pair[0])
    block_v, num_warps = next(at_once, config.pass_blocks[-1])
    return min(block_v, value_dim), num_warps


def _launch_pass(
    memory: DeltaMemory,
    chunks: DeltaChunks,
    weights: DeltaDecodeWeights,
    mixed_TC: torch.Tensor,
    tiles: _Tiles,
    out_THV: torch.Tensor,
    config: PrefillConfig,
) -> None:
    shape = _shape(memory, weights)
    block_v, num_warps = _pass_block(memory, chunks.num_chunks, config)
    delta_pass_kernel[(shape["H"] * shape["V"] // block_v, chunks.num_chunks)](
        memory.state_SHKV,
        memory.ring.u_RHPV,
        memory.conv_rows_SQC,
        chunks.cu_seqlens_N1,
        chunks.read_slots_N,
        chunks.live_slots_N,
        chunks.cu_pages_N1,
        chunks.checkpoint_slots_G,
        mixed_TC,
        _blocks_of(tiles.q, TILE_TOKENS),
        _blocks_of(tiles.k, TILE_TOKENS),
        _blocks_of(tiles.corrected0, block_v),
        _blocks_of(tiles.from_state, shape["K"]),
        _blocks_of(tiles.scores, TILE_TOKENS),
        tiles.decays,
        out_THV,
        mixed_TC.stride(0),
        **shape,
        BLOCK_V=block_v,
        SPAN=config.span,
        STAGES=config.pass_stages,
        FORM="ieee" if is_interpreted() else config.pass_form,
        INTERPRETED=is_interpreted(),
        num_warps=num_warps,
        num_stages=config.pass_stages,
    )
