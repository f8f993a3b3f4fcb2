"""The pass over all logits, and the edits: what later kernels need to know of each part of a row.

A row is cut into chunks of 2,048 logits and those into blocks of 64. Of each block the survey keeps
the best logit, of each chunk the best logit and two sums of exponentials: at temperature 1 for the
log-probabilities, at the row's own for its draw. Edits come after the survey, so that the sums at
temperature 1 stay those of the unedited logits; only the chunks that they touch are summed again.

Legend: `R` rows, `V` vocabulary, `B` blocks, `C` chunks, `E` edits, `F` fields.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.sample import settings

CHUNK = 2048
BLOCK = 64

# Planes of the chunks' statistics `[R, plane, C]`.
NUM_PLANES = 4
PLANES = tl.constexpr(NUM_PLANES)
RAW_BEST, RAW_SUM, BEST, SUM = (tl.constexpr(plane) for plane in range(NUM_PLANES))

ROW_FIELDS = tl.constexpr(settings.NUM_ROW_FIELDS)
INVERSE_TEMPERATURE = tl.constexpr(settings.INVERSE_TEMPERATURE)
FIRST_EDIT = tl.constexpr(settings.FIRST_EDIT)
END_EDIT = tl.constexpr(settings.END_EDIT)
EDIT_FIELDS = tl.constexpr(settings.NUM_EDIT_FIELDS)
ROW = tl.constexpr(settings.ROW)
TOKEN = tl.constexpr(settings.TOKEN)
BIAS = tl.constexpr(settings.BIAS)
PENALTY = tl.constexpr(settings.PENALTY)
ADDEND = tl.constexpr(settings.ADDEND)


@triton.jit
def _finite_or_zero(best):
    """What to subtract before exponentials; a part without any finite logit has nothing to sum."""
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def _summarise(x, block_best_ptr, stats_ptr, row, chunk, inverse, NUM_CHUNKS, CHUNK, BLOCK):
    """Store the blocks' best, the chunk's best and its sum at the row's temperature; return the best."""
    blocks = tl.arange(0, CHUNK // BLOCK)
    block_best = tl.max(x, axis=1)
    tl.store(block_best_ptr + (row * NUM_CHUNKS + chunk) * (CHUNK // BLOCK) + blocks, block_best)
    best = tl.max(block_best, axis=0)
    place = stats_ptr + row * PLANES * NUM_CHUNKS + chunk
    tl.store(place + BEST * NUM_CHUNKS, best)
    if inverse > 0.0:
        weights = tl.exp((x - _finite_or_zero(best)) * inverse)
        tl.store(place + SUM * NUM_CHUNKS, tl.sum(tl.sum(weights, axis=1), axis=0))
    return best


@triton.jit
def survey_kernel(
    logits_ptr,
    rows_ptr,
    block_best_ptr,
    stats_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inverse = tl.load(rows_ptr + row * ROW_FIELDS + INVERSE_TEMPERATURE).to(tl.float32)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits_ptr + row * row_stride + tokens, mask=tokens < VOCAB, other=float("-inf"))
    best = _summarise(x, block_best_ptr, stats_ptr, row, chunk, inverse, NUM_CHUNKS, CHUNK, BLOCK)
    place = stats_ptr + row * PLANES * NUM_CHUNKS + chunk
    tl.store(place + RAW_BEST * NUM_CHUNKS, best)
    tl.store(place + RAW_SUM * NUM_CHUNKS, tl.sum(tl.sum(tl.exp(x - _finite_or_zero(best)), axis=1), axis=0))


@triton.jit(do_not_specialize=["num_rows"])
def edit_kernel(
    logits_ptr,
    rows_ptr,
    edits_ptr,
    unedited_ptr,
    block_best_ptr,
    stats_ptr,
    num_rows,
    row_stride,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the edited logits in place, keep the unedited ones per edit, and summarise again.

    Edits are sorted: the program of a chunk's first edit does all edits of that chunk.
    """
    num_edits = tl.load(rows_ptr + (num_rows - 1) * ROW_FIELDS + END_EDIT).to(tl.int32)
    for first in range(tl.program_id(0), num_edits, tl.num_programs(0)):
        place = edits_ptr + first * EDIT_FIELDS
        row = tl.load(place + ROW).to(tl.int64)
        chunk = tl.load(place + TOKEN).to(tl.int32) // CHUNK
        previous = place - tl.where(first > 0, EDIT_FIELDS, 0)
        previous_chunk = tl.load(previous + TOKEN).to(tl.int32) // CHUNK
        continues = (first > 0) & (tl.load(previous + ROW).to(tl.int64) == row) & (previous_chunk == chunk)
        if not continues and chunk < NUM_CHUNKS:
            tokens = (
                chunk * CHUNK + tl.arange(0, CHUNK // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            )
            x = tl.load(logits_ptr + row * row_stride + tokens, mask=tokens < VOCAB, other=float("-inf"))
            row_end = tl.load(rows_ptr + row * ROW_FIELDS + END_EDIT).to(tl.int32)
            token = tl.load(place + TOKEN).to(tl.int32)
            edit = first
            while (edit < row_end) & (token // CHUNK == chunk):
                # From the tile, not from memory: another warp may have written its edit there already.
                logit = tl.sum(tl.sum(tl.where(tokens == token, x, 0.0), axis=1), axis=0)
                tl.store(unedited_ptr + edit, logit)
                place = edits_ptr + edit * EDIT_FIELDS
                logit += tl.load(place + BIAS).to(tl.float32)
                penalty = tl.load(place + PENALTY).to(tl.float32)
                logit = tl.where(logit > 0, tl.div_rn(logit, penalty), logit * penalty)
                logit += tl.load(place + ADDEND).to(tl.float32)
                tl.store(logits_ptr + row * row_stride + token, logit, mask=token < VOCAB)
                x = tl.where(tokens == token, logit, x)
                edit += 1
                token = tl.load(edits_ptr + tl.minimum(edit, num_edits - 1) * EDIT_FIELDS + TOKEN).to(
                    tl.int32
                )
            inverse = tl.load(rows_ptr + row * ROW_FIELDS + INVERSE_TEMPERATURE).to(tl.float32)
            _summarise(x, block_best_ptr, stats_ptr, row, chunk, inverse, NUM_CHUNKS, CHUNK, BLOCK)
