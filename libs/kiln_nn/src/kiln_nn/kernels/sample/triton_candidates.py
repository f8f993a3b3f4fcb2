"""The best few logits of a row, found through the best logit of each of its blocks.

All logits above the best maximum of the blocks that are left out lie within the others. So once the
threshold of top-k, top-p and min-p lies above that, the rest of the row does not matter.

Legend: `B` blocks, `N` candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)
# Where the search for a border begins: between 1/8 and 32 below the best logit, as bits.
_NEAR, _FAR = tl.constexpr(0x3E000000), tl.constexpr(0x42000000)
_BLOCKS_AT_ONCE = tl.constexpr(64)


@triton.jit
def distance_bits(scaled):
    """How far below the best a scaled logit lies, as an integer of the same order; NaN and -inf last."""
    return tl.abs(scaled).to(tl.int32, bitcast=True)


@triton.jit
def first_above(weights, target):
    """Index of the first entry whose cumulative weight exceeds the target, and the sum before it.

    Where rounding left none, the last entry that adds anything.
    """
    upto = tl.cumsum(weights, axis=0)
    last_rise = tl.sum((upto < tl.max(upto, axis=0)).to(tl.int32), axis=0)
    first = tl.minimum(tl.sum((upto <= target).to(tl.int32), axis=0), last_rise)
    before = tl.max(tl.where(tl.arange(0, weights.shape[0]) < first, upto, 0.0), axis=0)
    return first, before


@triton.jit
def at(values, index):
    """The entry at an index that is known only at run time."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), axis=0)


@triton.jit
def _border(block_z, wanted, limit):
    """A distance (as bits) such that `wanted` to twice as many blocks have their best logit nearer.

    Bisects between 0 and `limit`, which is taken where few blocks enough lie within.
    """
    low, high = limit * 0, limit
    is_searching = tl.sum((block_z < limit).to(tl.int32), axis=0) > 2 * wanted
    border = limit
    guess = low + _NEAR
    while is_searching:
        middle = tl.where((guess > low) & (guess < high), guess, low + (high - low) // 2)
        guess = tl.where(guess == _NEAR, _FAR, 0)
        count = tl.sum((block_z < middle).to(tl.int32), axis=0)
        if count > 2 * wanted:
            high = middle
        else:
            low = middle
        is_searching = ((count > 2 * wanted) | (count < wanted)) & (high - low > 1)
        border = low
    return border


@triton.jit
def _gather(
    logits_row_ptr, block_z, border, best, inverse, blocks_ptr, scaled_ptr, ids_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, MOST_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Copy the scaled logits nearer than the border, in the vocabulary's order; return their number.

    Those past the room for them are counted and not kept.
    """
    is_chosen = block_z < border
    places = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    tl.store(blocks_ptr + places, tl.arange(0, block_z.shape[0]), mask=is_chosen)
    num_blocks = tl.sum(is_chosen.to(tl.int32), axis=0)
    tl.debug_barrier()
    num_candidates = num_blocks * 0
    entries = tl.arange(0, _BLOCKS_AT_ONCE * BLOCK)
    for start in range(0, num_blocks, _BLOCKS_AT_ONCE):
        block = start + entries // BLOCK
        is_there = block < num_blocks
        ids = tl.load(blocks_ptr + block, mask=is_there, other=0) * BLOCK + entries % BLOCK
        is_there = is_there & (ids < VOCAB)
        scaled = (tl.load(logits_row_ptr + ids, mask=is_there, other=float("-inf")) - best) * inverse
        is_near = is_there & (distance_bits(scaled) < border)
        rooms = num_candidates + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
        is_kept = is_near & (rooms < MOST_CANDIDATES)
        tl.store(scaled_ptr + rooms, scaled, mask=is_kept)
        tl.store(ids_ptr + rooms, ids, mask=is_kept)
        num_candidates += tl.sum(is_near.to(tl.int32), axis=0)
    tl.debug_barrier()
    return num_candidates


@triton.jit
def _threshold(scaled, num_candidates, top_k, top_p, log_min_p, row_sum, has_all_allowed, has_all_finite):
    """The smallest scaled logit that may be drawn, and whether the candidates were enough to know.

    `scaled` are the candidates, -inf behind them. As `truncation.py` in the reference.
    """
    ranked = tl.sort(scaled, descending=True)
    rank = tl.arange(0, scaled.shape[0])
    has_k = (top_k > 0) & (top_k <= num_candidates)
    in_top_k = (rank < num_candidates) & ((rank < top_k) | (top_k <= 0))
    weights = tl.where(in_top_k, tl.exp(ranked), 0.0).to(tl.float64)
    upto = tl.cumsum(weights, axis=0)
    in_sum = tl.max(upto, axis=0)
    mass = tl.where(has_k, in_sum, row_sum)
    knows_mass = has_k | (top_k <= 0) | has_all_finite
    has_p = top_p < 1.0
    needed = tl.where(has_p, top_p * mass, float("inf"))
    is_kept = in_top_k & (upto - weights < needed)
    last = tl.maximum(tl.sum(is_kept.to(tl.int32), axis=0), 1) - 1
    is_found = (knows_mass & (in_sum >= needed)) | (has_k & (top_p >= 1.0))
    # Not found, but nothing that the candidates lack could be kept: all that min-p allows is.
    is_found_below = has_all_allowed & (knows_mass | (top_p >= 1.0))
    threshold = tl.where(is_found, tl.maximum(at(ranked, last), log_min_p), log_min_p)
    return threshold, is_found | is_found_below


@triton.jit
def draw_from_candidates(
    logits_row_ptr, block_z, wanted, best, inverse, uniform, top_k, top_p, log_min_p, row_sum,
    blocks_ptr, scaled_ptr, ids_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, MOST_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Draw from what `wanted` to twice as many blocks hold.

    Returns: whether that sufficed, the token, the logarithm of its probability, and the distance below
        which all logits were seen (0 where there was no room for them).
    """
    limit = tl.minimum(distance_bits(log_min_p) + 1, INFINITY_BITS)
    border = _border(block_z, wanted, limit)
    num_candidates = _gather(
        logits_row_ptr, block_z, border, best, inverse, blocks_ptr, scaled_ptr, ids_ptr,
        VOCAB, BLOCK, MOST_CANDIDATES,
    )  # fmt: skip
    candidates = tl.arange(0, MOST_CANDIDATES)
    is_candidate = candidates < num_candidates
    scaled = tl.load(scaled_ptr + candidates, mask=is_candidate, other=float("-inf"))
    threshold, is_known = _threshold(
        scaled, num_candidates, top_k, top_p, log_min_p, row_sum, border == limit, border == INFINITY_BITS
    )
    weights = tl.where(is_candidate & (scaled >= threshold), tl.exp(scaled), 0.0).to(tl.float64)
    total = tl.sum(weights, axis=0)
    chosen, _ = first_above(weights, uniform * total)
    token = at(tl.load(ids_ptr + candidates, mask=is_candidate, other=0), chosen)
    sampled = at(scaled, chosen).to(tl.float64) - tl.log(total)
    has_room = num_candidates <= MOST_CANDIDATES
    tl.debug_barrier()
    return is_known & has_room, token, sampled, tl.where(has_room, border, 0)
