"""Decoding with a DeltaNet layer against its slots, in place: convolution to gated norm.

`delta_decode` takes one token per row, `delta_verify` the last sampled token and drafts behind it.
The states of full pages are written for all layers together: `delta_commit` does it at the end of a step
of single tokens, `delta_fold` at the beginning of one with drafts.
"""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import ShapeMismatch, check_shape
from kiln_nn.kernels.delta_decode.memory import (
    NO_SLOT,
    DeltaDecodeWeights,
    DeltaMemory,
    DeltaRows,
    check_memory,
)
from kiln_nn.kernels.delta_decode.reference import delta_commit_reference, delta_decode_reference
from kiln_nn.kernels.delta_decode.verify_reference import delta_fold_reference, delta_verify_reference
from kiln_nn.kernels.dispatch import takes_triton
from kiln_nn.kernels.quantised import RoundedRows

__all__ = [
    "NO_SLOT",
    "DeltaDecodeWeights",
    "DeltaMemory",
    "DeltaRows",
    "delta_commit",
    "delta_decode",
    "delta_fold",
    "delta_verify",
]


def delta_decode(
    memory: DeltaMemory,
    rows: DeltaRows,
    weights: DeltaDecodeWeights,
    mixed_RC: torch.Tensor,
    a_RH: torch.Tensor,
    b_RH: torch.Tensor,
    z_RHV: torch.Tensor,
    *,
    commits: bool = True,
    is_batch_invariant: bool = False,
    rounds: bool = False,
    reads_early: bool = False,
) -> torch.Tensor | RoundedRows:
    """Advance every row by one token and write what it leaves behind into `memory`.

    `mixed_RC` are the rows q|k|v before the convolution, `a`, `b` and `z` the layer's other
    projections. Each row convolves its token with the J rows before it, normalises q and k,
    reads its committed state and its ring, appends the token to the ring, commits where asked
    to, and leaves through the gated norm. No host synchronisation on the Triton path.

    Every row's length is below the memory's `page_tokens`, however much room its ring has for drafts.

    Without `commits` nothing is committed yet: `delta_commit` does it for all layers, once their
    steps are done and before the rows' next step. That is faster on a GPU. Batch-invariant kernels
    are the same for any number of rows; the reference ignores that.

    With `reads_early` a kernel may read `rows` and what they remember before the one launched just before
    has ended: since all of it was written, a kernel that starts no dependents has been launched
    (`dependent_launch.py`).

    Returns: `[R, H, V]` in the format of `z`, ready for the output projection. With `rounds` the same as
    rows `[R, H V]` that are rounded to E4M3 too, a scale for each head's 128 outputs, where the kernel that is
    chosen does that; only on GPUs that have the format.

    Raises:
        ShapeMismatch: a tensor does not fit the others.
    """
    check_memory(memory, weights)
    num_heads, value_dim = memory.state_SHKV.shape[1], memory.state_SHKV.shape[3]
    check_shape("mixed", mixed_RC, (rows.num_rows, memory.conv_rows_SQC.shape[2]))
    check_shape("a", a_RH, (rows.num_rows, num_heads))
    check_shape("b", b_RH, (rows.num_rows, num_heads))
    check_shape("z", z_RHV, (rows.num_rows, num_heads, value_dim))
    if takes_triton(memory.state_SHKV, mixed_RC, rows.ring_slots_R):
        from kiln_nn.kernels.delta_decode import triton

        if triton.supports(memory, weights, mixed_RC, a_RH, b_RH, z_RHV):
            config = triton.invariant_config(memory.state_SHKV.dtype) if is_batch_invariant else None
            return triton.delta_decode(
                memory,
                rows,
                weights,
                mixed_RC,
                a_RH,
                b_RH,
                z_RHV,
                config,
                commits=commits,
                rounds=rounds,
                reads_early=reads_early,
            )
    return delta_decode_reference(memory, rows, weights, mixed_RC, a_RH, b_RH, z_RHV, commits=commits)


def delta_commit(layers: DeltaMemory, rows: DeltaRows) -> None:
    """Fold the rings of the rows that commit into new states, in all layers at once.

    `layers` has the layers as first dimension of every tensor; each layer's `delta_decode` of these
    rows has run without commits. No host synchronisation on the Triton path.

    Raises:
        ShapeMismatch: the layers' tensors do not fit each other.
    """
    _check_layers(layers)
    if not layers.state_SHKV.shape[0]:
        return
    if takes_triton(layers.state_SHKV, rows.ring_slots_R):
        from kiln_nn.kernels.delta_decode import triton, triton_commit

        is_small = rows.num_rows <= triton_commit.MOST_ROWS
        if is_small and triton.supports_memory(layers.layer(0)):
            triton_commit.delta_commit(layers, rows)
            return
    delta_commit_reference(layers, rows)


def delta_fold(layers: DeltaMemory, rows: DeltaRows) -> None:
    """Fold the rings that hold a full page, in all layers at once, as `delta_verify` describes it.

    `layers` has the layers as first dimension of every tensor; each layer's `delta_verify` of these
    rows follows without folds. No host synchronisation on the Triton path.

    Raises:
        ShapeMismatch: the layers' tensors do not fit each other.
    """
    _check_layers(layers)
    if not layers.state_SHKV.shape[0]:
        return
    if takes_triton(layers.state_SHKV, rows.ring_slots_R):
        from kiln_nn.kernels.delta_decode import triton, triton_commit, triton_fold

        is_small = rows.num_rows <= triton_commit.MOST_ROWS
        if is_small and triton.supports_memory(layers.layer(0)):
            triton_fold.delta_fold(layers, rows)
            return
    delta_fold_reference(layers, rows)


def delta_verify(
    memory: DeltaMemory,
    rows: DeltaRows,
    num_new_R: torch.Tensor,
    weights: DeltaDecodeWeights,
    mixed_RNC: torch.Tensor,
    a_RNH: torch.Tensor,
    b_RNH: torch.Tensor,
    z_RNHV: torch.Tensor,
    *,
    folds: bool = True,
) -> torch.Tensor:
    """Take up to N new tokens per row, of which the caller accepts a prefix afterwards.

    Line j of a row is its j-th new token (the last sampled one, then drafts); of `num_new_R`
    lines, at least 1, the rest is ignored and its output zero. Every token attends to those before it
    as if each had been a step of its own. The protocol, with `n` the page's tokens:

    - `lengths` counts the accepted tokens in the ring of `ring_slots`, since the boundary of the
      state in `read_slots`. The new tokens are appended behind them, over whatever was
      there. Nothing of them is committed in this launch.
    - The caller then accepts m of the new tokens, 1 <= m <= num_new, by counting them in the
      row's next length. Nothing is copied: rejected entries are overwritten by the next step.
    - If that made the length n or more, the next step folds the page before anything else:
      `commit_slots` (otherwise NO_SLOT) then names the slot for the state at the boundary inside
      the ring. The row lives in that slot from then on: the length - n tokens behind the boundary
      move to the front of its ring, their sums of log-decays begin anew there, its
      convolution tail is that of the boundary, and the new tokens follow. The next
      length counts from length - n. The slot may be the row's own or a second one; then
      the state in `read_slots` and the old ring stay as they are, and may serve as checkpoint.
      Without `folds` that has been done already: `delta_fold` does it for all layers, before
      the first of them. That is faster on a GPU. `rows` are the same for both.
    - A row whose length is below n may go on with `delta_decode`, and come back.

    So a ring of n + max_draft_tokens entries serves N = max_draft_tokens + 1 new tokens.

    Returns: `[R, N, H, V]` in the format of `z`.

    Raises:
        ShapeMismatch: a tensor does not fit the others, or the ring cannot hold N new tokens.
    """
    check_memory(memory, weights)
    num_heads, value_dim = memory.state_SHKV.shape[1], memory.state_SHKV.shape[3]
    num_new_tokens, capacity = mixed_RNC.shape[1], memory.ring.k_RhPK.shape[2]
    check_shape("mixed", mixed_RNC, (rows.num_rows, None, memory.conv_rows_SQC.shape[2]))
    check_shape("num_new", num_new_R, (rows.num_rows,))
    check_shape("a", a_RNH, (rows.num_rows, num_new_tokens, num_heads))
    check_shape("b", b_RNH, (rows.num_rows, num_new_tokens, num_heads))
    check_shape("z", z_RNHV, (rows.num_rows, num_new_tokens, num_heads, value_dim))
    if not 1 <= num_new_tokens <= min(memory.page_tokens, capacity - memory.page_tokens + 1):
        most = f"1 to {min(memory.page_tokens, capacity - memory.page_tokens + 1)}"
        raise ShapeMismatch("mixed", mixed_RNC.shape, (rows.num_rows, most, mixed_RNC.shape[2]))
    verify = delta_verify_reference
    if takes_triton(memory.state_SHKV, mixed_RNC, rows.ring_slots_R):
        from kiln_nn.kernels.delta_decode import triton, triton_verify

        lines = (mixed_RNC[:, 0], a_RNH[:, 0], b_RNH[:, 0], z_RNHV[:, 0])
        if num_new_tokens <= triton_verify.MOST_NEW_TOKENS and triton.supports(memory, weights, *lines):
            verify = triton_verify.delta_verify
    return verify(memory, rows, num_new_R, weights, mixed_RNC, a_RNH, b_RNH, z_RNHV, folds=folds)


def _check_layers(layers: DeltaMemory) -> None:
    num_layers, num_slots, num_heads, key_dim, value_dim = layers.state_SHKV.shape
    num_key_heads, capacity = layers.ring.k_RhPK.shape[2:4]
    in_ring = (num_layers, num_slots, num_heads, capacity)
    keys = (num_layers, num_slots, num_key_heads, capacity, key_dim)
    check_shape("ring.k", layers.ring.k_RhPK, keys)
    check_shape("ring.u", layers.ring.u_RHPV, (*in_ring, value_dim))
    check_shape("ring.log_decay", layers.ring.log_decay_RHP, in_ring)
    check_shape("conv_rows", layers.conv_rows_SQC, (num_layers, num_slots, None, None))
