"""Several adapters as one, layer by layer, in float64.

As PEFT's add_weighted_adapter does it, so that a merge here gives what PEFT would: each source counts
with factor = weight * scaling, and the result has scaling 1.

- concat: A and B side by side, the exact weighted sum of the updates; the ranks add up.
- linear: A and B are summed apart, each times the root of its factor. Cross terms come with it: it is
  not the sum of the updates.
- ties: as linear, but of each matrix the largest entries alone are kept, entries whose sign loses the
  vote are left out, and those that agree are averaged.

Papers: Yadav et al. 2023, TIES-Merging (arXiv 2306.01708); Ilharco et al. 2022, Editing Models with
Task Arithmetic (arXiv 2212.04089).
Legend: `r` rank, `I` inputs and `O` outputs of a linear layer, `N` sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kiln_registry.adapter_file import Matrix, Update

MODES = ("linear", "ties", "concat")


def merge_updates(
    mode: str, updates: Sequence[Update], weights: Sequence[float], *, density: float, rank: int
) -> tuple[Matrix, Matrix]:
    """(A [rank, I], B [O, rank]) of one layer that all `updates` change; one for each weight."""
    factors = [weight * update.scaling for weight, update in zip(weights, updates, strict=True)]
    if mode == "concat":
        return _concatenate(updates, factors, rank)
    # The sign goes with A alone; with both it would cancel.
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed_roots = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    a_matrices, b_matrices = [update.a_rI for update in updates], [update.b_Or for update in updates]
    if mode == "linear":
        return _weighted_sum(a_matrices, signed_roots), _weighted_sum(b_matrices, roots)
    return _ties(a_matrices, signed_roots, density), _ties(b_matrices, roots, density)


def _concatenate(updates: Sequence[Update], factors: Sequence[float], rank: int) -> tuple[Matrix, Matrix]:
    """Filled up with zeros to `rank` where not every source changes the layer."""
    a_rI = np.concatenate([factor * update.a_rI for factor, update in zip(factors, updates, strict=True)])
    b_Or = np.concatenate([update.b_Or for update in updates], axis=1)
    missing = rank - len(a_rI)
    return np.pad(a_rI, ((0, missing), (0, 0))), np.pad(b_Or, ((0, 0), (0, missing)))


def _weighted_sum(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    return np.einsum("n,nij->ij", np.asarray(weights), np.stack(matrices))


def _ties(matrices: Sequence[Matrix], weights: Sequence[float], density: float) -> Matrix:
    kept_N = np.stack([_largest(matrix, density) for matrix in matrices])
    majority = np.where(kept_N.sum(axis=0) >= 0, 1.0, -1.0)
    agrees_N = np.sign(kept_N) == majority
    weighted_N = kept_N * np.asarray(weights)[:, None, None]
    return (weighted_N * agrees_N).sum(axis=0) / np.maximum(agrees_N.sum(axis=0), 1)


def _largest(matrix: Matrix, density: float) -> Matrix:
    """The matrix with all but the largest int(density * size) entries set to zero."""
    num_kept = int(density * matrix.size)
    if num_kept >= matrix.size:
        return matrix
    kept = np.zeros_like(matrix)
    places = np.argpartition(np.abs(matrix), matrix.size - num_kept - 1, axis=None)[matrix.size - num_kept :]
    kept.flat[places] = matrix.flat[places]
    return kept
