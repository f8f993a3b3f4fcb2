"""Prefill chunks of a DeltaNet layer in three Triton launches.

Source: the chunked gated delta rule of gated_delta/chunked.py (Yang et al. 2024, arXiv 2406.06484
and 2412.06464), with the convolution, norms and gates in front of it and the gated norm behind.
`triton_tiles` computes what a tile of 64 tokens needs, all tiles at once; `triton_pass` carries the
states through each chunk and writes everything that is kept; a last launch norms the outputs.

Supported: K and V powers of two from 16 to 128, any number of value heads per key head, convolution
width 2 to 8, pages of 8 to 64 tokens (a power of two, no fewer than the convolution's width), ring up
to 64 tokens, contiguous memory. State in float32 or bfloat16, ring in float32, the rest in float32 or
bfloat16. Everything else takes the reference. With float32 inputs all products are float32; with
bfloat16 ones the operands of products are, except in the triangular inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_nn.kernels.delta_decode import DeltaDecodeWeights, DeltaMemory
from kiln_nn.kernels.delta_prefill.chunks import TILE_TOKENS, DeltaChunks
from kiln_nn.kernels.delta_prefill.triton_pass import delta_norm_kernel, delta_pass_kernel
from kiln_nn.kernels.delta_prefill.triton_tiles import delta_tiles_kernel
from kiln_nn.kernels.dispatch import device_limits, is_interpreted

_FLOATS = (torch.float32, torch.bfloat16)
_NORM_ROWS = 32


@dataclass(frozen=True)
class PrefillConfig:
    """How the programs compute; a form is "bf16" or the precision of float32 products."""

    tile_form: str = "bf16"
    inverse_form: str = "tf32"
    tile_warps: int = 4
    # A program takes one value head, instead of all that share a key head.
    splits_groups: bool = False
    pass_form: str = "bf16"
    # Value columns of a state that one program carries, and its loop's stages.
    block_v: int = 64
    pass_warps: int = 4
    pass_stages: int = 3
    # Tiles that are looked through for checkpoints at a time.
    span: int = 256


# By format of the inputs and whether a program may have 200 KB of shared memory, or only 99.
CONFIGS = {
    (torch.bfloat16, True): PrefillConfig(),
    (torch.bfloat16, False): PrefillConfig(pass_stages=2),
    (torch.float32, True): PrefillConfig(
        "tf32x3", "tf32x3", tile_warps=8, pass_form="tf32x3", block_v=32, pass_stages=1
    ),
    (torch.float32, False): PrefillConfig(
        "ieee", "ieee", tile_warps=8, pass_form="tf32x3", block_v=32, pass_stages=1
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
        and 2 <= weights.conv_CW.shape[1] <= 8
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


@dataclass(frozen=True)
class _Tiles:
    """What the tile kernel hands to the pass, by tile number and head; time runs along the last axis.

    Tile `i` of chunk `n` is number `cu_seqlens[n] // 64 + n + i`.
    """

    q: torch.Tensor  # [tiles, h, 64, K]
    k: torch.Tensor  # [tiles, h, 64, K]
    corrected0: torch.Tensor  # [tiles, H, V, 64]: u if the state were zero
    from_state: torch.Tensor  # [tiles, H, K, 64]: u = corrected0 + from_state S
    scores: torch.Tensor  # [tiles, H, 64, 64]: decayed k.q, column for column
    decays: torch.Tensor  # [tiles, H, 3, 64] float32: log-decay G, e^G, decay to the last boundary

    def all(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.corrected0, self.from_state, self.scores, self.decays


def _tiles(memory: DeltaMemory, num_tiles: int, dtype: torch.dtype) -> _Tiles:
    _, num_heads, key_dim, value_dim = memory.state_SHKV.shape
    num_key_heads = memory.ring.k_RhPK.shape[1]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((num_tiles, *shape), dtype=dtype, device=memory.state_SHKV.device)

    return _Tiles(
        q=empty(num_key_heads, TILE_TOKENS, key_dim),
        k=empty(num_key_heads, TILE_TOKENS, key_dim),
        corrected0=empty(num_heads, value_dim, TILE_TOKENS),
        from_state=empty(num_heads, key_dim, TILE_TOKENS),
        scores=empty(num_heads, TILE_TOKENS, TILE_TOKENS),
        decays=empty(num_heads, 3, TILE_TOKENS, dtype=torch.float32),
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
    """Three launches; the arguments are those of the package's public function and within `supports`."""
    num_tokens, num_heads, value_dim = z_THV.shape
    config = config or config_for(mixed_TC.dtype, mixed_TC.device)
    out_THV = torch.empty(z_THV.shape, dtype=z_THV.dtype, device=z_THV.device)
    if num_tokens == 0:
        return out_THV
    tiles = _tiles(memory, num_tokens // TILE_TOKENS + chunks.num_chunks, mixed_TC.dtype)
    _launch_tiles(memory, chunks, weights, mixed_TC, a_TH, b_TH, tiles, config)
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


def _launch_tiles(
    memory: DeltaMemory,
    chunks: DeltaChunks,
    weights: DeltaDecodeWeights,
    mixed_TC: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    tiles: _Tiles,
    config: PrefillConfig,
) -> None:
    shape = _shape(memory, weights)
    heads_per_program = 1 if config.splits_groups else shape["H"] // shape["HK"]
    # The interpreter computes all products in float32.
    form, inverse_form = ("ieee", "ieee") if is_interpreted() else (config.tile_form, config.inverse_form)
    delta_tiles_kernel[(shape["H"] // heads_per_program, chunks.tile_chunks_B.shape[0])](
        memory.ring.k_RhPK,
        memory.ring.log_decay_RHP,
        memory.conv_rows_SQC,
        chunks.cu_seqlens_N1,
        chunks.read_slots_N,
        chunks.live_slots_N,
        chunks.tile_chunks_B,
        chunks.tile_starts_B,
        mixed_TC,
        a_TH,
        b_TH,
        weights.conv_CW,
        weights.A_log_H,
        weights.dt_bias_H,
        *tiles.all(),
        mixed_TC.stride(0),
        a_TH.stride(0),
        b_TH.stride(0),
        **shape,
        HEADS=heads_per_program,
        FORM=form,
        INVERSE_FORM=inverse_form,
        num_warps=config.tile_warps,
        num_stages=1,
    )


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
    block_v = min(config.block_v, shape["V"])
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
        *tiles.all(),
        out_THV,
        mixed_TC.stride(0),
        **shape,
        BLOCK_V=block_v,
        SPAN=config.span,
        STAGES=config.pass_stages,
        FORM="ieee" if is_interpreted() else config.pass_form,
        INTERPRETED=is_interpreted(),
        num_warps=config.pass_warps,
        num_stages=config.pass_stages,
    )
