"""Drawing from what the survey left: one program per row, which reads a few thousand logits again.

A plain row finds the chunk in which its uniform number falls and then the token within. A row that
truncates looks at its best candidates, at few first and then at more. Where these do not settle it (a
flat row whose top-p reaches thousands of tokens, many ties), the row is left to `triton_search`.

Legend: `R` rows, `V` vocabulary, `C` chunks, `B` blocks, `N` candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.sample import settings
from kiln_nn.kernels.sample.triton_candidates import at, distance_bits, draw_from_candidates, first_above
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

# Candidates at the first and at the second look.
FEW_CANDIDATES, MOST_CANDIDATES = 256, 1024
# Blocks at the first look are more than the row's top-k, so that ties seldom reach the border.
_SPARE_BLOCKS = tl.constexpr(24)

UNIFORM = tl.constexpr(settings.UNIFORM)
TOP_K = tl.constexpr(settings.TOP_K)
TOP_P = tl.constexpr(settings.TOP_P)
LOG_MIN_P = tl.constexpr(settings.LOG_MIN_P)
DRAWN_FIELDS = tl.constexpr(settings.NUM_DRAWN_FIELDS)
DRAWN_TOKEN = tl.constexpr(settings.DRAWN_TOKEN)
LOGPROB = tl.constexpr(settings.LOGPROB)
SAMPLED_LOGPROB = tl.constexpr(settings.SAMPLED_LOGPROB)

# What the search needs of a row that is left to it: best logit, sum of all weights, log of the sum at
# temperature 1, and a distance (as bits) that the threshold is known to lie beyond.
NUM_NOTES = 5
NOTES = tl.constexpr(NUM_NOTES)
IS_OPEN, ROW_BEST, ROW_SUM, RAW_LOG_SUM, SEEN = (tl.constexpr(note) for note in range(NUM_NOTES))


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
def draw_kernel(
    logits_ptr, rows_ptr, edits_ptr, unedited_ptr, block_best_ptr, stats_ptr, blocks_ptr, scaled_ptr, ids_ptr,
    notes_ptr, arrivals_ptr, tokens_ptr, drawn_ptr, row_stride,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, FEW_CANDIDATES: tl.constexpr, MOST_CANDIDATES: tl.constexpr,
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
        blocks_ptr += row * MOST_CANDIDATES
        scaled_ptr += row * MOST_CANDIDATES
        ids_ptr += row * MOST_CANDIDATES
        wanted = tl.minimum(
            tl.where(top_k > 0, top_k + _SPARE_BLOCKS, FEW_CANDIDATES // 4), FEW_CANDIDATES // 2
        )
        is_known, token, sampled, seen = draw_from_candidates(
            logits_row_ptr, block_z, wanted, best, inverse, uniform, top_k, top_p, log_min_p, row_sum,
            blocks_ptr, scaled_ptr, ids_ptr, VOCAB, BLOCK, FEW_CANDIDATES,
        )  # fmt: skip
        if not is_known:
            is_known, token, sampled, seen_more = draw_from_candidates(
                logits_row_ptr, block_z, wanted * 0 + MOST_CANDIDATES // 4, best, inverse, uniform, top_k, top_p,
                log_min_p, row_sum, blocks_ptr, scaled_ptr, ids_ptr, VOCAB, BLOCK, MOST_CANDIDATES,
            )  # fmt: skip
            seen = tl.maximum(seen, seen_more)
        is_open = tl.where(is_known, 0, 1)
        notes = notes_ptr + row * NOTES
        tl.store(notes + ROW_BEST, best.to(tl.float64))
        tl.store(notes + ROW_SUM, row_sum)
        tl.store(notes + RAW_LOG_SUM, raw_log_sum)
        tl.store(notes + SEEN, seen.to(tl.float64))
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
