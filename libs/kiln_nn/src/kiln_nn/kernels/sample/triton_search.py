"""Drawing for rows whose candidates did not suffice: the exact threshold by passes over the row.

Distances from the best logit, read as integers, are searched in eighths: a pass counts and weighs
what lies nearer than each of eight borders. At most eleven passes find the k-th best logit, and as
many the one at which top-p is reached; usually six or seven leave a single logit between two
borders. A last pass sums what is kept.

Several programs share a row while all programs together fit the GPU at once, so that they can wait
for each other between passes; with more rows than that a program has its row alone.

Legend: `R` rows, `C` chunks, `P` programs of a row, `N` borders.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.sample.triton_draw import (
    INFINITY_BITS,
    IS_OPEN,
    LOG_MIN_P,
    NOTES,
    RAW_LOG_SUM,
    ROW_BEST,
    ROW_SUM,
    TOP_K,
    TOP_P,
    UNIFORM,
    at,
    distance_bits,
    finish,
    first_above,
)
from kiln_nn.kernels.sample.triton_survey import INVERSE_TEMPERATURE, PLANES, ROW_FIELDS, SUM

NUM_BORDERS = 8
BORDERS = tl.constexpr(NUM_BORDERS)


@triton.jit
def _wait_for_all(arrivals_ptr, wanted, PROGRAMS: tl.constexpr):
    """Go on when all programs of the row have come here; what they stored before can be read then."""
    tl.debug_barrier()
    if PROGRAMS > 1:
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") + 1
        while arrived < wanted:
            arrived = tl.atomic_add(arrivals_ptr, 0, sem="acq_rel")
        tl.debug_barrier()


@triton.jit
def _nearer_than(
    logits_row_ptr, borders_N, best, inverse, partial_ptr, arrivals_ptr, wanted,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """How many logits lie nearer than each border, and their weight, both float64 `[N]`."""
    entries = tl.arange(0, CHUNK)
    weight_NC = tl.zeros([BORDERS, CHUNK], tl.float32)
    count_NC = tl.zeros([BORDERS, CHUNK], tl.int32)
    for chunk in range(tl.program_id(0), NUM_CHUNKS, PROGRAMS):
        ids = chunk * CHUNK + entries
        x = tl.load(logits_row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
        scaled = (x - best) * inverse
        is_near = distance_bits(scaled)[None, :] < borders_N[:, None]
        weight_NC += tl.where(is_near, tl.exp(scaled)[None, :], 0.0)
        count_NC += is_near.to(tl.int32)
    weight_N = tl.sum(weight_NC, axis=1).to(tl.float64)
    count_N = tl.sum(count_NC, axis=1).to(tl.float64)
    if PROGRAMS == 1:
        return count_N, weight_N
    borders = tl.arange(0, BORDERS)
    programs = tl.arange(0, PROGRAMS)
    mine = partial_ptr + borders * PROGRAMS + tl.program_id(0)
    tl.store(mine, count_N)
    tl.store(mine + BORDERS * PROGRAMS, weight_N)
    _wait_for_all(arrivals_ptr, wanted, PROGRAMS)
    theirs = partial_ptr + borders[:, None] * PROGRAMS + programs[None, :]
    counts = tl.load(theirs, cache_modifier=".cg")
    weights = tl.load(theirs + BORDERS * PROGRAMS, cache_modifier=".cg")
    return tl.sum(counts, axis=1), tl.sum(weights, axis=1)


@triton.jit
def _reach(
    logits_row_ptr, target, by_count, high, best, inverse, partial_ptr, arrivals_ptr, num_passes,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The nearest border below `high` within which count or weight reach the target.

    Returns: the border, the weight within the best `target` logits, and the passes so far.
    """
    PARTIALS: tl.constexpr = 2 * BORDERS * PROGRAMS
    low = high * 0
    low_count, low_weight = target * 0.0, target * 0.0
    weight = target * 0.0
    is_searching = high > 0
    while is_searching:
        step = (high - low + BORDERS - 1) // BORDERS
        borders_N = tl.minimum(low + step * (tl.arange(0, BORDERS) + 1), high)
        num_passes += 1
        # Two sets in turn: nobody can be two passes ahead of a program that still reads.
        count_N, weight_N = _nearer_than(
            logits_row_ptr, borders_N, best, inverse, partial_ptr + (num_passes % 2) * PARTIALS, arrivals_ptr,
            num_passes * PROGRAMS, VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS,
        )  # fmt: skip
        reached_N = tl.where(by_count, count_N, weight_N)
        index = tl.minimum(tl.sum((reached_N < target).to(tl.int32), axis=0), BORDERS - 1)
        high = at(borders_N, index)
        if index > 0:
            low = at(borders_N, index - 1)
            low_count = at(count_N, index - 1)
            low_weight = at(weight_N, index - 1)
        weight = at(weight_N, index)
        is_searching = (high - low > 1) & (at(count_N, index) - low_count > 1)
    # Ties at the border: only as many as the count asks for have weight in what follows.
    if by_count & (high - low == 1):
        tied = tl.exp(-low.to(tl.float32, bitcast=True)).to(tl.float64)
        weight = tl.minimum(weight, low_weight + (target - low_count) * tied)
    return high, weight, num_passes


@triton.jit
def search_kernel(
    logits_ptr, rows_ptr, edits_ptr, unedited_ptr, stats_ptr, notes_ptr, partial_ptr, arrivals_ptr,
    tokens_ptr, drawn_ptr, row_stride,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """`PROGRAMS` programs per row; a row that is drawn already costs nothing."""
    row = tl.program_id(1).to(tl.int64)
    notes = notes_ptr + row * NOTES
    if tl.load(notes + IS_OPEN) > 0:
        logits_row_ptr = logits_ptr + row * row_stride
        partial_ptr += row * 4 * BORDERS * PROGRAMS
        arrivals_ptr += row
        settings_ptr = rows_ptr + row * ROW_FIELDS
        inverse = tl.load(settings_ptr + INVERSE_TEMPERATURE).to(tl.float32)
        top_k = tl.load(settings_ptr + TOP_K).to(tl.int32)
        top_p = tl.load(settings_ptr + TOP_P)
        log_min_p = tl.load(settings_ptr + LOG_MIN_P).to(tl.float32)
        best = tl.load(notes + ROW_BEST).to(tl.float32)
        mass = tl.load(notes + ROW_SUM)

        num_passes = tl.program_id(0) * 0
        high = num_passes + INFINITY_BITS
        if (top_k > 0) & (top_k < VOCAB):
            high, mass, num_passes = _reach(
                logits_row_ptr, top_k.to(tl.float64), True, high, best, inverse, partial_ptr, arrivals_ptr, num_passes,
                VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS,
            )  # fmt: skip
        if top_p < 1.0:
            high, mass, num_passes = _reach(
                logits_row_ptr, top_p * mass, False, high, best, inverse, partial_ptr, arrivals_ptr, num_passes,
                VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS,
            )  # fmt: skip
        high = tl.minimum(high, distance_bits(log_min_p) + 1)

        entries = tl.arange(0, CHUNK)
        sums = stats_ptr + (row * PLANES + SUM) * NUM_CHUNKS
        for chunk in range(tl.program_id(0), NUM_CHUNKS, PROGRAMS):
            ids = chunk * CHUNK + entries
            x = tl.load(logits_row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
            scaled = (x - best) * inverse
            weights = tl.where(distance_bits(scaled) < high, tl.exp(scaled), 0.0)
            tl.store(sums + chunk, tl.sum(weights, axis=0))
        _wait_for_all(arrivals_ptr, (num_passes + 1) * PROGRAMS, PROGRAMS)
        if tl.program_id(0) == 0:
            chunks = tl.arange(0, CHUNKS)
            sum_C = tl.load(sums + chunks, mask=chunks < NUM_CHUNKS, other=0.0, cache_modifier=".cg")
            weights_C = sum_C.to(tl.float64)
            total = tl.sum(weights_C, axis=0)
            target = tl.load(settings_ptr + UNIFORM) * total
            chunk, before = first_above(weights_C, target)
            ids = chunk * CHUNK + entries
            x = tl.load(logits_row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
            scaled = (x - best) * inverse
            weights = tl.where(distance_bits(scaled) < high, tl.exp(scaled), 0.0).to(tl.float64)
            entry, _ = first_above(weights, target - before)
            token = tl.minimum(chunk * CHUNK + entry, VOCAB - 1)
            sampled = at(scaled, entry).to(tl.float64) - tl.log(total)
            finish(
                logits_row_ptr, rows_ptr, edits_ptr, unedited_ptr, tokens_ptr, drawn_ptr, row, token,
                tl.load(logits_row_ptr + token), sampled, tl.load(notes + RAW_LOG_SUM), VOCAB,
            )  # fmt: skip
