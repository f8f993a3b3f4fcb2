"""Device code that the decode step and the speculative step of a DeltaNet layer share.

Legend: as in `memory.py`; a "channel" is one of the convolution's, "entries" count the ring.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """`log(1 + e^x)`; small results keep their relative precision, which slow decays need."""
    y = tl.exp(tl.minimum(x, 20.0))
    s = y / (2.0 + y)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3 + s2 * (0.2 + s2 * (1.0 / 7 + s2 / 9))))
    return tl.where(x > 20.0, x, tl.where(y < 0.25, series, tl.log(1.0 + y)))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def prefetch_lines(start, NUM_ELEMENTS: tl.constexpr):
    """Ask for a contiguous run to come to the L2 cache, while the program does something else."""
    LINE: tl.constexpr = 128 // (start.dtype.element_ty.primitive_bitwidth // 8)
    lines = (start + tl.arange(0, NUM_ELEMENTS // LINE) * LINE).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def convolve(
    token, conv_rows, conv_weight, channels, read_slot, ring_slot, length,
    C: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Convolution of one token's channels before SiLU, the J rows before it from tail and ring.

    `token` is the token's own value of these channels.
    """
    J: tl.constexpr = W - 1
    y = token.to(tl.float32) * tl.load(conv_weight + channels * W + J).to(tl.float32)
    for tap in tl.static_range(J):
        place = length + tap
        slot = tl.where(place < J, read_slot, ring_slot)
        row = tl.load(conv_rows + (slot * (J + P) + place) * C + channels).to(tl.float32)
        y += row * tl.load(conv_weight + channels * W + tap).to(tl.float32)
    return y


@triton.jit
def unit(x):
    """A vector scaled to length 1."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def fold_block(
    source, target, ring_k_base, ring_u_base, log_decay_base, num_tokens, first,
    K: tl.constexpr, V: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """`S <- e^G S + sum_i e^(G - G_i) k_i u_i^T` over a ring's first tokens, for BLOCK_K rows of one head's S."""
    value = tl.arange(0, V)
    entries = tl.arange(0, ENTRIES)
    used = entries < num_tokens
    rows = first + tl.arange(0, BLOCK_K)
    places = rows[:, None] * V + value[None, :]
    old = tl.load(source + places)
    log_decays = tl.load(log_decay_base + entries, mask=used, other=0.0)
    keys = tl.load(ring_k_base + entries[None, :] * K + rows[:, None], mask=used[None, :], other=0.0)
    u = tl.load(ring_u_base + entries[:, None] * V + value[None, :], mask=used[:, None], other=0.0)
    # The sum of log-decays only falls, so its last entry is its smallest.
    total = tl.min(log_decays, 0)
    weight = tl.where(used, tl.exp(total - log_decays), 0.0)
    new = tl.dot(keys.to(tl.float32), u.to(tl.float32) * weight[:, None], input_precision=FORM)
    new += tl.exp(total) * old.to(tl.float32)
    tl.store(target + places, new.to(target.dtype.element_ty))
