"""Drawing the next token of each row from its logits, by the row's own settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.sample import reference
from kiln_nn.kernels.sample.settings import NUM_DRAWN_FIELDS, NUM_EDIT_FIELDS, NUM_ROW_FIELDS

__all__ = ["draw_tokens"]


def draw_tokens(
    logits_RV: torch.Tensor,
    rows_RF: torch.Tensor,
    edits_EF: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    is_batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from float32 logits, as the tables of `settings` say.

    Order: the row's edits, temperature, top-k, top-p, min-p, then the first token in the order of
    the vocabulary whose cumulative weight exceeds the row's uniform number times the total. A row of
    NaNs yields a token of the vocabulary and a NaN log-probability. The logits are the same after
    the call as before.

    On a GPU nothing depends on what the tables hold, so the call can be captured in a CUDA graph.
    `out` is a place for the result. Batch-invariant kernels sum a row in the same order in any
    company, which is slow for flat rows with top-p; the reference ignores that.

    Returns: tokens int64 `[R]` and, in the fields that `settings` names, tokens and log-probabilities
        float64 `[R, F]`.
    """
    num_rows, _ = logits_RV.shape
    check_shape("rows", rows_RF, (num_rows, NUM_ROW_FIELDS))
    check_shape("edits", edits_EF, (None, NUM_EDIT_FIELDS))
    if out is None:
        drawn_RF = rows_RF.new_empty(num_rows, NUM_DRAWN_FIELDS)
        out = rows_RF.new_empty(num_rows, dtype=torch.int64), drawn_RF
    check_shape("out tokens", out[0], (num_rows,))
    check_shape("out drawn", out[1], (num_rows, NUM_DRAWN_FIELDS))
    implementation: Callable[..., None] = reference.draw_tokens
    if takes_triton(logits_RV, rows_RF, edits_EF):
        from kiln_nn.kernels.sample import triton

        if triton.takes(logits_RV, rows_RF, edits_EF):
            implementation = partial(triton.draw_tokens, is_batch_invariant=is_batch_invariant)
    implementation(logits_RV, rows_RF, edits_EF, *out)
    return out
