"""The prefill's convolution, SiLU and L2 norms, from the step's rows into tiles of 64 tokens.

A program slides over 16 tokens of a few heads and keeps the convolution's window in registers, so
that every row is read about once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.delta_decode.triton_parts import silu


@triton.jit
def find_tile(tile_chunks, tile_starts, cu_seqlens, place):
    """Chunk, offset in it, first token, tokens left from the offset on, and number in the scratch.

    Nothing is left of a tile that pads the list. Tiles of a chunk follow each other in the
    scratch; no two chunks share one.
    """
    chunk = tl.load(tile_chunks + place).to(tl.int32)
    start = tl.load(tile_starts + place).to(tl.int32)
    safe_chunk = tl.maximum(chunk, 0)
    first = tl.load(cu_seqlens + safe_chunk).to(tl.int64)
    remaining = (tl.load(cu_seqlens + safe_chunk + 1) - first).to(tl.int32) - start
    remaining = tl.where(chunk < 0, 0, remaining)
    return chunk, start, first + start, remaining, first // 64 + chunk + start // 64


@triton.jit
def conv_tap(conv_weight, channels, tap: tl.constexpr, W: tl.constexpr):
    """Weights of the tap `tap` of four, of which a narrower convolution lacks the first ones."""
    if tap + W < 4:
        return tl.zeros_like(channels).to(tl.float32)
    else:
        return tl.load(conv_weight + channels * W + (tap + W - 4)).to(tl.float32)


@triton.jit
def _row_before(
    mixed_rows, mixed_stride, tail, channels, source, num_tokens, has_tail,
    C: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """The chunk's input row `source`, which may be one of the J of the tail before it, else zeros."""
    of_chunk = (channels >= 0) & (source >= 0) & (source < num_tokens)
    x = tl.load(mixed_rows + source.to(tl.int64) * mixed_stride + channels, mask=of_chunk, other=0.0)
    of_tail = (channels >= 0) & (source < 0) & (source >= -J) & has_tail
    y = tl.load(tail + (source + J) * C + channels, mask=of_tail, other=0.0)
    return x.to(tl.float32) + y.to(tl.float32)


@triton.jit
def _convolve_run(
    mixed_rows, mixed_stride, tail, has_tail, conv_weight, channels, offset, num_tokens, scale,
    targets, target_stride,
    C: tl.constexpr, W: tl.constexpr, RUN: tl.constexpr, NORMALISES: tl.constexpr,
):  # fmt: skip
    """RUN rows of [heads, width] channels, `offset` tokens into the chunk; the last may be zeros.

    With NORMALISES each head's row gets the length `scale`. Row `i` goes to `targets + i * target_stride`.
    """
    J: tl.constexpr = W - 1
    w0, w1 = conv_tap(conv_weight, channels, 0, W), conv_tap(conv_weight, channels, 1, W)
    w2, w3 = conv_tap(conv_weight, channels, 2, W), conv_tap(conv_weight, channels, 3, W)
    x3 = _row_before(mixed_rows, mixed_stride, tail, channels, offset - 3, num_tokens, has_tail, C, J)
    x2 = _row_before(mixed_rows, mixed_stride, tail, channels, offset - 2, num_tokens, has_tail, C, J)
    x1 = _row_before(mixed_rows, mixed_stride, tail, channels, offset - 1, num_tokens, has_tail, C, J)
    rows = mixed_rows + offset.to(tl.int64) * mixed_stride
    for row in tl.static_range(RUN):
        is_token = (channels >= 0) & (offset + row < num_tokens)
        x0 = tl.load(rows + (row * mixed_stride + channels), mask=is_token, other=0.0).to(tl.float32)
        y = silu(w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0)
        if NORMALISES:
            y *= (scale * tl.rsqrt(tl.sum(y * y, 1) + 1e-6))[:, None]
        y = tl.where(is_token, y, 0.0)
        tl.store(targets + row * target_stride, y.to(targets.dtype.element_ty))
        x3 = x2
        x2 = x1
        x1 = x0


@triton.jit
def delta_conv_kernel(
    conv_rows, cu_seqlens, read_slots, tile_chunks, tile_starts, mixed, conv_weight,
    q_tiles, k_tiles, v_tiles, mixed_stride,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Grid ((2 HK + H) / HEADS, B 64 / RUN): HEADS heads of q, k or v, RUN tokens."""
    C: tl.constexpr = 2 * HK * K + H * V
    RUNS: tl.constexpr = 64 // RUN
    first_head = tl.program_id(0) * HEADS
    chunk, start, first_row, remaining, tile = find_tile(
        tile_chunks, tile_starts, cu_seqlens, tl.program_id(1) // RUNS
    )
    if remaining <= 0:
        return
    in_tile = tl.program_id(1) % RUNS * RUN
    read_slot = tl.load(read_slots + chunk).to(tl.int64)
    has_tail = read_slot >= 0
    tail = conv_rows + tl.maximum(read_slot, 0) * (W - 1 + P) * C
    rows = mixed + (first_row - start) * mixed_stride
    offset, num_tokens = start + in_tile, start + remaining
    head = tl.arange(0, HEADS)[:, None]
    if first_head < 2 * HK:
        key = tl.arange(0, K)[None, :]
        # The heads of k follow those of q.
        is_k = first_head >= HK
        targets = k_tiles if is_k else q_tiles
        targets += (tile * HK + first_head % HK) * 64 * K + (head * 64 + in_tile) * K + key
        _convolve_run(
            rows, mixed_stride, tail, has_tail, conv_weight, (first_head + head) * K + key, offset, num_tokens,
            tl.where(is_k, 1.0, K**-0.5), targets, K, C, W, RUN, True,
        )  # fmt: skip
    else:
        value = tl.arange(0, V)[None, :]
        first_value = first_head - 2 * HK
        v_targets = v_tiles + (tile * H + first_value) * 64 * V + (head * 64 + in_tile) * V + value
        _convolve_run(
            rows, mixed_stride, tail, has_tail, conv_weight, 2 * HK * K + (first_value + head) * V + value,
            offset, num_tokens, 1.0, v_targets, V, C, W, RUN, False,
        )  # fmt: skip
