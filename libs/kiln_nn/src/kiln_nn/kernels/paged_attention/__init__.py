"""Attention over a paged KV cache: one token per row (decode) and prompt chunks with a past."""

from kiln_nn.kernels.paged_attention.reference import (
    paged_decode_attention,
    paged_prefill_attention,
    write_kv,
)

__all__ = ["paged_decode_attention", "paged_prefill_attention", "write_kv"]
