"""Query and key norms, rotary embedding and the write into KV pages in one Triton launch.

Papers: Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467);
Su et al. 2021, RoFormer (arXiv 2104.09864).

Takes head widths that are powers of two from 16 to 256, any even rotated width, up to 16 query
heads per kv head, projections in bf16, fp16 or float32, a cache in the same format or in fp8
(e4m3, compute capability 8.9 and newer, unit scale, larger numbers cut to its range). Arithmetic is float32 and rounds once,
where the reference also rounds between norm and rotation. One program does one token's kv head
with the query heads that share it. Angles are the float32 products that the reference takes, reduced
to a quarter turn in float64: their cosines and sines are right at any position.

Measured against float64 under the interpreter: 1e-7 relative in float32. bf16: one rounding.

Legend: `T` tokens, `H` query heads, `h` kv heads, `D` head width, `E` rotated width, `F` rotated pairs, `P` pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIMS = (16, 32, 64, 128, 256)
_MOST_GROUPED_HEADS = 16


@triton.jit
def _cos_and_sin(angles):
    """Of float32 angles of any size: quarter turns are taken off in float64, then polynomials.

    Coefficients: Cephes, sinf.c (Moshier); absolute error 1e-7.
    """
    exact = angles.to(tl.float64)
    turns = tl.floor(exact * 0.6366197723675814 + 0.5)
    x = (exact - turns * 1.5707963267948966).to(tl.float32)
    quadrant = turns.to(tl.int32) & 3
    square = x * x
    sin = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    tail = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cos = 1.0 - 0.5 * square + square * square * tail
    is_swapped = (quadrant & 1) == 1
    cos_size = tl.where(is_swapped, sin, cos)
    sin_size = tl.where(is_swapped, cos, sin)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos_size, cos_size)
    return cos, tl.where(quadrant >= 2, -sin_size, sin_size)


@triton.jit
def _store_in_cache(ptrs, x):
    """Store float32 numbers in the cache's format; fp8 has no infinity to overflow to."""
    if ptrs.dtype.element_ty.is_fp8():
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(ptrs, x.to(ptrs.dtype.element_ty))


@triton.jit
def _norm_and_rotate(
    x_ptr,
    weight_ptr,
    heads,
    head_stride,
    is_head,
    cos,
    sin,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
):
    """Rows `[heads, HEAD_DIM]` from `x_ptr`, normed by 1 + weight and rotated, in float32."""
    columns = tl.arange(0, HEAD_DIM)
    is_turning = columns < ROTARY_DIM
    # Component i turns against component i + E/2.
    is_first = columns < ROTARY_DIM // 2
    partners = tl.where(is_first, columns + ROTARY_DIM // 2, columns - ROTARY_DIM // 2)
    rows = x_ptr + heads[:, None] * head_stride
    turning = is_head[:, None] & is_turning[None, :]
    x = tl.load(rows + columns[None, :], mask=is_head[:, None], other=0.0).to(tl.float32)
    partner = tl.load(rows + partners[None, :], mask=turning, other=0.0).to(tl.float32)
    weight = 1.0 + tl.load(weight_ptr + columns).to(tl.float32)
    partner_weight = 1.0 + tl.load(weight_ptr + partners, mask=is_turning, other=0.0).to(tl.float32)
    partner_weight = tl.where(is_first, -partner_weight, partner_weight)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
    straight, across = weight * cos, partner_weight * sin
    return (x * straight[None, :] + partner * across[None, :]) * inverse[:, None]


@triton.jit
def _qk_norm_rope_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position_ptr,
    frequency_ptr,
    slot_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    columns = tl.arange(0, HEAD_DIM)
    # Components that are not rotated turn by nothing.
    frequencies = tl.load(frequency_ptr + columns % (ROTARY_DIM // 2), mask=columns < ROTARY_DIM, other=0.0)
    cos, sin = _cos_and_sin(tl.load(position_ptr + token).to(tl.float32) * frequencies)
    grouped = tl.arange(0, GROUP_BLOCK)
    is_head = grouped < GROUP
    heads = kv_head * GROUP + grouped
    q_token = q_ptr + token * q_token_stride
    q = _norm_and_rotate(
        q_token, q_weight_ptr, heads, q_head_stride, is_head, cos, sin, eps, HEAD_DIM, ROTARY_DIM
    )
    q_places = (token * (KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + columns[None, :]
    tl.store(q_out_ptr + q_places, q.to(q_out_ptr.dtype.element_ty), mask=is_head[:, None])
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot >= 0:
        one = tl.arange(0, 1)
        k_token = k_ptr + token * k_token_stride
        k = _norm_and_rotate(
            k_token, k_weight_ptr, kv_head + one, k_head_stride, one == 0, cos, sin, eps, HEAD_DIM, ROTARY_DIM
        )
        places = (slot * KV_HEADS + kv_head + one[:, None]) * HEAD_DIM + columns[None, :]
        _store_in_cache(k_cache_ptr + places, k)
        v_places = (kv_head + one[:, None]) * v_head_stride + columns[None, :]
        v = tl.load(v_ptr + token * v_token_stride + v_places).to(tl.float32)
        _store_in_cache(v_cache_ptr + places, v)


def takes(
    q_THD: torch.Tensor,
    k_ThD: torch.Tensor,
    v_ThD: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    positions_T: torch.Tensor,
    inverse_frequencies_F: torch.Tensor,
    token_slots_T: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
) -> bool:
    """Whether the kernel computes these shapes, formats and strides."""
    del token_slots_T, positions_T
    head_dim, cache_format = q_THD.shape[2], k_cache_PShD.dtype
    is_fp8 = cache_format is torch.float8_e4m3fn and q_THD.dtype is not torch.float32
    if is_fp8 and q_THD.is_cuda:
        is_fp8 = torch.cuda.get_device_capability(q_THD.device) >= (8, 9)
    rows = (q_THD, k_ThD, v_ThD, q_weight_D, k_weight_D)
    return (
        q_THD.shape[0] > 0
        and head_dim in _HEAD_DIMS
        and 0 < 2 * inverse_frequencies_F.shape[0] <= head_dim
        and inverse_frequencies_F.dtype is torch.float32
        and inverse_frequencies_F.is_contiguous()
        and q_THD.shape[1] // k_ThD.shape[1] <= _MOST_GROUPED_HEADS
        and all(x.dtype in _FORMATS and x.stride(-1) == 1 for x in rows)
        and (cache_format is q_THD.dtype or is_fp8)
        and v_cache_PShD.dtype is cache_format
        and k_cache_PShD.is_contiguous()
        and v_cache_PShD.is_contiguous()
    )


def qk_norm_rope_write(
    q_THD: torch.Tensor,
    k_ThD: torch.Tensor,
    v_ThD: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    positions_T: torch.Tensor,
    inverse_frequencies_F: torch.Tensor,
    token_slots_T: torch.Tensor,
    k_cache_PShD: torch.Tensor,
    v_cache_PShD: torch.Tensor,
) -> torch.Tensor:
    """As the reference, for inputs that `takes` accepts."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_ThD.shape[1]
    group = num_heads // num_kv_heads
    q_out = q_THD.new_empty(q_THD.shape)
    _qk_norm_rope_write_kernel[(num_tokens, num_kv_heads)](
        q_THD,
        k_ThD,
        v_ThD,
        q_weight_D,
        k_weight_D,
        positions_T,
        inverse_frequencies_F,
        token_slots_T,
        q_out,
        k_cache_PShD,
        v_cache_PShD,
        eps,
        *q_THD.stride()[:2],
        *k_ThD.stride()[:2],
        *v_ThD.stride()[:2],
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=triton.next_power_of_2(group),
        HEAD_DIM=head_dim,
        ROTARY_DIM=2 * inverse_frequencies_F.shape[0],
        num_warps=2,
    )
    return q_out
