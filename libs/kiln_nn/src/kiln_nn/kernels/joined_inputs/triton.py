"""Embeddings and hidden states side by side in Triton: one launch for lookups, norms and concatenation.

Takes embedding, hidden states and carried lines of one format (float32, bf16, fp16) whose last dimension
is contiguous, up to 16,384 wide, and int64 numbers. Arithmetic is float32, the result is rounded once:
within 1e-6 of the reference in float32 under the interpreter.

Launched the usual way: what comes behind may not begin before it has ended.

Source: our own. Legend: `T` tokens of a pass, `S` slots, `N` lines of a slot, `D` hidden width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.joined_inputs.reference import IN_PASS, CarriedLines

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 16_384
_IN_PASS = tl.constexpr(IN_PASS)


@triton.jit(do_not_specialize=["num_tokens", "num_lines"])
def _joined_kernel(
    embedding_ptr,
    token_ids_ptr,
    hidden_ptr,
    carried_ptr,
    line_ptr,
    slots_ptr,
    embedding_norm_ptr,
    hidden_norm_ptr,
    out_ptr,
    num_tokens,
    num_lines,
    embedding_stride,
    hidden_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_CARRIED: tl.constexpr,
):
    """One program for each token and half: the embedding, or the hidden state."""
    token, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    in_width = cols < WIDTH
    is_hidden = half == 1
    token_id = tl.load(token_ids_ptr + token)
    # What a half does not read is masked off, so that both are one piece of code.
    embedded = tl.load(
        embedding_ptr + token_id * embedding_stride + cols, mask=in_width & (half == 0), other=0.0
    )
    x = embedded.to(tl.float32)
    weight = tl.load(embedding_norm_ptr + cols, mask=in_width & (half == 0), other=0.0).to(tl.float32)
    weight += tl.load(hidden_norm_ptr + cols, mask=in_width & is_hidden, other=0.0).to(tl.float32)
    if HAS_CARRIED:
        slot = tl.load(slots_ptr + token)
        before = (token + num_tokens - 1) % num_tokens
        reads_pass = is_hidden & (slot == _IN_PASS)
        reads_kept = is_hidden & (slot >= 0)
        place = tl.where(slot >= 0, slot, 0)
        line = tl.load(line_ptr + place)
        kept = carried_ptr + (place * num_lines + line) * WIDTH + cols
        x += tl.load(kept, mask=in_width & reads_kept, other=0.0).to(tl.float32)
    else:
        before = token
        reads_pass = is_hidden
    hidden = hidden_ptr + before * hidden_stride + cols
    x += tl.load(hidden, mask=in_width & reads_pass, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    out = (x * inverse * (1.0 + weight)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * 2 + half) * WIDTH + cols, out, mask=in_width)


def takes(
    embedding_VD: torch.Tensor,
    token_ids_T: torch.Tensor,
    hidden_TD: torch.Tensor,
    embedding_norm_D: torch.Tensor,
    hidden_norm_D: torch.Tensor,
    carried: CarriedLines | None,
) -> bool:
    """Whether the kernel computes these shapes, formats and strides."""
    numbers, rows = [token_ids_T], [embedding_VD, hidden_TD]
    if carried is not None:
        numbers += [carried.line_S, carried.slots_T]
        rows.append(carried.lines_SND)
    return (
        hidden_TD.dtype in _FORMATS
        and all(each.dtype is hidden_TD.dtype and each.stride(-1) == 1 for each in rows)
        and all(each.dtype is torch.int64 and each.is_contiguous() for each in numbers)
        and all(each.dtype in _FORMATS and each.is_contiguous() for each in (embedding_norm_D, hidden_norm_D))
        and (carried is None or carried.lines_SND.is_contiguous())
        and 0 < hidden_TD.shape[1] <= _WIDEST
        and hidden_TD.shape[0] > 0
    )


def joined_inputs(
    embedding_VD: torch.Tensor,
    token_ids_T: torch.Tensor,
    hidden_TD: torch.Tensor,
    embedding_norm_D: torch.Tensor,
    hidden_norm_D: torch.Tensor,
    eps: float,
    *,
    carried: CarriedLines | None = None,
) -> torch.Tensor:
    """As the reference, for inputs that `takes` accepts."""
    num_tokens, width = hidden_TD.shape
    out = hidden_TD.new_empty(num_tokens, 2 * width)
    block = triton.next_power_of_2(width)
    # Without carried lines their pointers are never used.
    lines, line, slots = (
        (hidden_TD, token_ids_T, token_ids_T)
        if carried is None
        else (carried.lines_SND, carried.line_S, carried.slots_T)
    )
    _joined_kernel[(num_tokens, 2)](
        embedding_VD,
        token_ids_T,
        hidden_TD,
        lines,
        line,
        slots,
        embedding_norm_D,
        hidden_norm_D,
        out,
        num_tokens,
        0 if carried is None else carried.lines_SND.shape[1],
        embedding_VD.stride(0),
        hidden_TD.stride(0),
        eps,
        WIDTH=width,
        BLOCK_D=block,
        HAS_CARRIED=carried is not None,
        num_warps=max(1, min(8, block // 256)),
    )
    return out
