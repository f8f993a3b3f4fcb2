"""Drawing from what the survey left: one program per row, which reads a few thousand logits again.

A plain row finds the chunk in which its uniform number falls and then the token within. A row that
truncates looks only at the blocks with the best maxima: all logits above the best maximum that is
left out are within those, so as soon as the threshold of top-k, top-p and min-p lies above it, the
rest of the row does not matter. Where it does not (a flat row whose top-p reaches thousands of
tokens, ties at the border), the row is left to `triton_search`.

Legend: `R` rows, `V` vocabulary, `C` chunks, `B` blocks, `N` candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.sample import settings
from kiln_nn.kernels.sample.triton_survey import (
    BEST,
    EDIT_FIELDS,
    END_EDIT,
    FIRST_EDIT,
    INVERSE_TEMPERATURE,
    PLANES,
    RAW_BEST,
    RAW_SUM,
    ROW_FIELDS,
    SUM,
    TOKEN,
)

MOST_BLOCKS = 512
MOST_CANDIDATES = 1024
# Blocks a row asks for: more than its top-k, so that ties seldom reach the border.
_SPARE_BLOCKS = tl.constexpr(32)
_BLOCKS_WITHOUT_TOP_K = tl.constexpr(384)

UNIFORM = tl.constexpr(settings.UNIFORM)
TOP_K = tl.constexpr(settings.TOP_K)
TOP_P = tl.constexpr(settings.TOP_P)
LOG_MIN_P = tl.constexpr(settings.LOG_MIN_P)
DRAWN_FIELDS = tl.constexpr(settings.NUM_DRAWN_FIELDS)
DRAWN_TOKEN = tl.constexpr(settings.DRAWN_TOKEN)
LOGPROB = tl.constexpr(settings.LOGPROB)
SAMPLED_LOGPROB = tl.constexpr(settings.SAMPLED_LOGPROB)

# What the search needs of a row that is left to it: best logit, sum of all weights, log of the sum at
# temperature 1.
NUM_NOTES = 4
NOTES = tl.constexpr(NUM_NOTES)
IS_OPEN, ROW_BEST, ROW_SUM, RAW_LOG_SUM = (tl.constexpr(note) for note in range(NUM_NOTES))

INFINITY_BITS = tl.constexpr(0x7F800000)


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
def finish(
    logits_row_ptr, rows_ptr, edits_ptr, unedited_ptr, tokens_ptr, drawn_ptr, row, token, logit, sampled,
    raw_log_sum, VOCAB: tl.constexpr,
):  # fmt: skip
    """Store the row's token and log-probabilities, and put back the logits that were edited."""
    first = tl.load(rows_ptr + row * ROW_FIELDS + FIRST_EDIT).to(tl.int32)
    end = tl.load(rows_ptr + row * ROW_FIELDS + END_EDIT).to(tl.int32)
    for start in range(first, end, 128):
        edits = start + tl.arange(0, 128)
        is_edit = edits < end
        edited = tl.load(edits_ptr + edits * EDIT_FIELDS + TOKEN, mask=is_edit, other=-1.0).to(tl.int32)
        unedited = tl.load(unedited_ptr + edits, mask=is_edit, other=0.0)
        is_token = edited == token
        if tl.max(is_token.to(tl.int32), axis=0) > 0:
            logit = tl.sum(tl.where(is_token, unedited, 0.0), axis=0)
        tl.store(logits_row_ptr + edited, unedited, mask=is_edit & (edited < VOCAB))
    place = drawn_ptr + row * DRAWN_FIELDS
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(place + DRAWN_TOKEN, token.to(tl.float64))
    tl.store(place + LOGPROB, logit.to(tl.float64) - raw_log_sum)
    tl.store(place + SAMPLED_LOGPROB, sampled)


@triton.jit
def _border(block_z, top_k, limit, MOST_BLOCKS: tl.constexpr):
    """A distance (as bits) such that a fitting number of blocks has its best logit nearer than that.

    Bisects between 0 and `limit`, which is taken where few blocks enough lie within.
    """
    wanted = tl.where(top_k > 0, top_k + _SPARE_BLOCKS, _BLOCKS_WITHOUT_TOP_K)
    wanted = tl.minimum(wanted, MOST_BLOCKS // 2)
    most = tl.minimum(2 * wanted, MOST_BLOCKS)
    low, high = limit * 0, limit
    is_searching = tl.sum((block_z < limit).to(tl.int32), axis=0) > most
    border = limit
    while is_searching:
        middle = low + (high - low) // 2
        count = tl.sum((block_z < middle).to(tl.int32), axis=0)
        if count > most:
            high = middle
        else:
            low = middle
        is_searching = ((count > most) | (count < wanted)) & (high - low > 1)
        border = low
    return border


@triton.jit
def _gather_candidates(
    logits_row_ptr, block_z, border, best, inverse, blocks_ptr, scaled_ptr, ids_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, MOST_BLOCKS: tl.constexpr, MOST_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Copy the scaled logits nearer than the border, in the vocabulary's order; return their number.

    Those past the room for them are counted and not kept.
    """
    STEP: tl.constexpr = 64 * BLOCK
    is_chosen = block_z < border
    places = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    tl.store(blocks_ptr + places, tl.arange(0, block_z.shape[0]), mask=is_chosen & (places < MOST_BLOCKS))
    num_blocks = tl.sum(is_chosen.to(tl.int32), axis=0)
    tl.debug_barrier()
    num_candidates = num_blocks * 0
    entries = tl.arange(0, STEP)
    for start in range(0, num_blocks, 64):
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
def draw_kernel(
    logits_ptr, rows_ptr, edits_ptr, unedited_ptr, block_best_ptr, stats_ptr, blocks_ptr, scaled_ptr, ids_ptr,
    notes_ptr, arrivals_ptr, tokens_ptr, drawn_ptr, row_stride,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, MOST_BLOCKS: tl.constexpr, MOST_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """One program per row. `CHUNKS` and `BLOCKS` are their numbers in a row, up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * row_stride
    settings_ptr = rows_ptr + row * ROW_FIELDS
    inverse = tl.load(settings_ptr + INVERSE_TEMPERATURE).to(tl.float32)
    uniform = tl.load(settings_ptr + UNIFORM)
    top_k = tl.load(settings_ptr + TOP_K).to(tl.int32)
    top_k = tl.where(top_k < VOCAB, top_k, 0)
    top_p = tl.load(settings_ptr + TOP_P)
    log_min_p = tl.load(settings_ptr + LOG_MIN_P).to(tl.float32)

    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < NUM_CHUNKS
    stats = stats_ptr + row * PLANES * NUM_CHUNKS + chunks
    raw_best_C = tl.load(stats + RAW_BEST * NUM_CHUNKS, mask=is_chunk, other=float("-inf"))
    raw_sum_C = tl.load(stats + RAW_SUM * NUM_CHUNKS, mask=is_chunk, other=0.0)
    best_C = tl.load(stats + BEST * NUM_CHUNKS, mask=is_chunk, other=float("-inf"))
    raw_best = tl.max(raw_best_C, axis=0)
    raw_sum = tl.sum((raw_sum_C * tl.exp(raw_best_C - raw_best)).to(tl.float64), axis=0)
    raw_log_sum = raw_best.to(tl.float64) + tl.log(raw_sum)
    best = tl.max(best_C, axis=0)

    token = row.to(tl.int32) * 0
    sampled = uniform * 0.0
    is_open = token
    truncates = (inverse > 0.0) & ((top_k > 0) | (top_p < 1.0) | (log_min_p > float("-inf")))
    if truncates:
        sum_C = tl.load(stats + SUM * NUM_CHUNKS, mask=is_chunk, other=0.0)
        row_sum = tl.sum((sum_C * tl.exp((best_C - best) * inverse)).to(tl.float64), axis=0)
        blocks = tl.arange(0, BLOCKS)
        block_best = tl.load(
            block_best_ptr + row * NUM_CHUNKS * (CHUNK // BLOCK) + blocks,
            mask=blocks < NUM_CHUNKS * (CHUNK // BLOCK),
            other=float("-inf"),
        )
        block_z = distance_bits((block_best - best) * inverse)
        limit = tl.minimum(distance_bits(log_min_p) + 1, INFINITY_BITS)
        border = _border(block_z, top_k, limit, MOST_BLOCKS)
        num_candidates = _gather_candidates(
            logits_row_ptr, block_z, border, best, inverse,
            blocks_ptr + row * MOST_BLOCKS, scaled_ptr + row * MOST_CANDIDATES, ids_ptr + row * MOST_CANDIDATES,
            VOCAB, BLOCK, MOST_BLOCKS, MOST_CANDIDATES,
        )  # fmt: skip
        candidates = tl.arange(0, MOST_CANDIDATES)
        is_candidate = candidates < num_candidates
        scaled = tl.load(
            scaled_ptr + row * MOST_CANDIDATES + candidates, mask=is_candidate, other=float("-inf")
        )
        threshold, is_known = _threshold(
            scaled, num_candidates, top_k, top_p, log_min_p, row_sum, border == limit, border == INFINITY_BITS
        )
        is_known = is_known & (num_candidates <= MOST_CANDIDATES)
        is_open = tl.where(is_known, 0, 1)
        weights = tl.where(is_candidate & (scaled >= threshold), tl.exp(scaled), 0.0).to(tl.float64)
        total = tl.sum(weights, axis=0)
        chosen, _ = first_above(weights, uniform * total)
        token = at(tl.load(ids_ptr + row * MOST_CANDIDATES + candidates, mask=is_candidate, other=0), chosen)
        sampled = at(scaled, chosen).to(tl.float64) - tl.log(total)
        notes = notes_ptr + row * NOTES
        tl.store(notes + ROW_BEST, best.to(tl.float64))
        tl.store(notes + ROW_SUM, row_sum)
        tl.store(notes + RAW_LOG_SUM, raw_log_sum)
    else:
        entries = tl.arange(0, CHUNK)
        if inverse > 0.0:
            sum_C = tl.load(stats + SUM * NUM_CHUNKS, mask=is_chunk, other=0.0)
            weights_C = (sum_C * tl.exp((best_C - best) * inverse)).to(tl.float64)
            total = tl.sum(weights_C, axis=0)
            chunk, before = first_above(weights_C, uniform * total)
            ids = chunk * CHUNK + entries
            x = tl.load(logits_row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
            weights = tl.exp((x - best) * inverse).to(tl.float64)
            entry, _ = first_above(weights, uniform * total - before)
            token = chunk * CHUNK + entry
            sampled = ((at(x, entry) - best) * inverse).to(tl.float64) - tl.log(total)
        else:
            chunk = tl.min(tl.where(best_C == best, chunks, CHUNKS), axis=0)
            ids = chunk * CHUNK + entries
            x = tl.load(logits_row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
            token = chunk * CHUNK + tl.min(tl.where(x == best, entries, CHUNK), axis=0)
    token = tl.minimum(token, VOCAB - 1)
    tl.store(notes_ptr + row * NOTES + IS_OPEN, is_open.to(tl.float64))
    tl.store(arrivals_ptr + row, 0)
    if is_open == 0:
        logit = tl.load(logits_row_ptr + token)
        finish(
            logits_row_ptr, rows_ptr, edits_ptr, unedited_ptr, tokens_ptr, drawn_ptr, row, token, logit, sampled,
            raw_log_sum, VOCAB,
        )  # fmt: skip
