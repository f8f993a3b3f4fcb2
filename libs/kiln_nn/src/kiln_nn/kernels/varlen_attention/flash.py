"""Causal attention over packed documents by the fused kernels that torch ships.

They are FlashAttention 2 (Dao 2023, arXiv 2307.08691) for documents of different lengths, with grouped
heads of up to 256 and a backward pass: a well-kept library does this better than we would.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import pairwise

import torch

_WIDEST_HEAD = 256
# Wider heads need more shared memory backward than these leave to one program.
_WIDEST_HEAD_ON_SMALL_GPUS = 192
_LARGE_CAPABILITIES = ((8, 0), (9, 0), (10, 0))


def why_not(q_THD: torch.Tensor, k_ThD: torch.Tensor, v_ThD: torch.Tensor) -> str | None:
    """What stands against these kernels for such tensors; None if nothing does."""
    if not q_THD.is_cuda:
        return "the tensors are not on a CUDA device"
    if os.environ.get("KILN_KERNELS") == "reference":
        return "KILN_KERNELS=reference is set"
    if q_THD.dtype not in (torch.bfloat16, torch.float16) or not q_THD.dtype is k_ThD.dtype is v_ThD.dtype:
        return f"they are {q_THD.dtype}, {k_ThD.dtype} and {v_ThD.dtype}, not all bfloat16 or float16"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has none"
    head_dim, capability = q_THD.shape[2], torch.cuda.get_device_capability(q_THD.device)
    widest = _WIDEST_HEAD if capability in _LARGE_CAPABILITIES else _WIDEST_HEAD_ON_SMALL_GPUS
    if head_dim > widest or head_dim % 8:
        return f"heads are {head_dim} wide; they take multiples of 8 up to {widest} on this GPU"
    if q_THD.shape[0] == 0:
        return "there are no tokens"
    return None


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # training may reuse what scoring cached
def _bounds_on_device(bounds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def varlen_attention(
    q_THD: torch.Tensor, k_ThD: torch.Tensor, v_ThD: torch.Tensor, bounds: tuple[int, ...], scale: float
) -> torch.Tensor:
    """As the reference, for tensors that nothing stands against."""
    cu_seqlens = _bounds_on_device(bounds, q_THD.device)
    longest = max(end - start for start, end in pairwise(bounds))
    # torch's own wrapper (torch.nn.attention.varlen) changed its arguments from release to release;
    # this operator, which it calls, has not, and has a gradient.
    out, *_ = torch.ops.aten._flash_attention_forward(
        q_THD, k_ThD, v_ThD, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=scale
    )
    return out  # type: ignore[no-any-return]
