"""Forbidding tokens: -inf where a row's bit is not set."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.token_mask import reference

__all__ = ["mask_tokens_", "num_words"]


def num_words(vocab_size: int) -> int:
    """How many 32-bit words hold one bit for each token."""
    return -(-vocab_size // 32)


def mask_tokens_(logits_RV: torch.Tensor, rows_M: torch.Tensor, bits_MW: torch.Tensor) -> torch.Tensor:
    """Set logits to -inf, in the rows `rows_M` (int64, each at most once), where their bit is 0.

    Bits are int32 words, the lowest token in the lowest bit. Other rows are not touched.

    Returns: `logsumexp` of the rows as they were, float32 `[M]`: what their log-probabilities without
        the mask are measured from.

    Raises:
        ShapeMismatch: not one line of words for each row, or too few words for the vocabulary.
    """
    check_shape("bits", bits_MW, (rows_M.shape[0], num_words(logits_RV.shape[1])))
    if takes_triton(logits_RV, rows_M, bits_MW):
        from kiln_nn.kernels.token_mask import triton

        if triton.takes(logits_RV, rows_M, bits_MW):
            return triton.mask_tokens_(logits_RV, rows_M, bits_MW)
    return reference.mask_tokens_(logits_RV, rows_M, bits_MW)
