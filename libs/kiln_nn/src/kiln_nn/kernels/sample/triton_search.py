"""Drawing for rows whose candidates did not suffice: the exact threshold by passes over the row.

Distances from the best logit, read as integers, are searched in eighths: a pass weighs (or counts)
what lies nearer than each of eight borders, until so few logits lie between two of them that they can
be collected and sorted; from where the candidates ended that takes two or three passes. A last pass
sums what is kept.

Several programs share a row while all programs together fit the GPU at once, so that they can wait
for each other between passes; with more rows than that a program has its row alone.

Legend: `R` rows, `C` chunks, `P` programs of a row, `N` borders, `L` collected logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.sample.triton_candidates import INFINITY_BITS, at, distance_bits, first_above
from kiln_nn.kernels.sample.triton_draw import (
    IS_OPEN,
    LOG_MIN_P,
    NOTES,
    RAW_LOG_SUM,
    ROW_BEST,
    ROW_SUM,
    SEEN,
    TOP_K,
    TOP_P,
    UNIFORM,
    finish,
)
from kiln_nn.kernels.sample.triton_survey import INVERSE_TEMPERATURE, PLANES, ROW_FIELDS, SUM

NUM_BORDERS = 8
BORDERS = tl.constexpr(NUM_BORDERS)
_STAGES = tl.constexpr(3)  # loads under way at once


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
def _weigh(
    logits_row_ptr, borders_N, by_count, best, inverse, partial_ptr, arrivals_ptr, num_passes,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The weight (or number) of the logits nearer than each border, float64 `[N]`. Pass `num_passes`."""
    entries = tl.arange(0, CHUNK)
    weight_NC = tl.zeros([BORDERS, CHUNK], tl.float32)
    for chunk in tl.range(tl.program_id(0), NUM_CHUNKS, PROGRAMS, num_stages=_STAGES):
        ids = chunk * CHUNK + entries
        x = tl.load(logits_row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
        scaled = (x - best) * inverse
        weights = tl.where(by_count, 1.0, tl.exp(scaled))
        is_near = distance_bits(scaled)[None, :] < borders_N[:, None]
        weight_NC += tl.where(is_near, weights[None, :], 0.0)
    weight_N = tl.sum(weight_NC, axis=1).to(tl.float64)
    if PROGRAMS > 1:
        borders = tl.arange(0, BORDERS)
        # Two sets in turn: nobody can be two passes ahead of a program that still reads.
        partial_ptr += (num_passes % 2) * BORDERS * PROGRAMS
        tl.store(partial_ptr + borders * PROGRAMS + tl.program_id(0), weight_N)
        _wait_for_all(arrivals_ptr, num_passes * PROGRAMS, PROGRAMS)
        parts = partial_ptr + borders[:, None] * PROGRAMS + tl.arange(0, PROGRAMS)[None, :]
        weight_N = tl.sum(tl.load(parts, cache_modifier=".cg"), axis=1)
    return weight_N


@triton.jit
def _collect(
    logits_row_ptr, low, high, best, inverse, list_ptr, arrivals_ptr, num_passes,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PROGRAMS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The distances from `low` to below `high`, at most `ROOM`, ascending; infinity behind them."""
    entries = tl.arange(0, CHUNK)
    counts_ptr = list_ptr + PROGRAMS * ROOM
    mine_ptr = list_ptr + tl.program_id(0) * ROOM
    num_mine = low * 0
    for chunk in tl.range(tl.program_id(0), NUM_CHUNKS, PROGRAMS, num_stages=_STAGES):
        ids = chunk * CHUNK + entries
        x = tl.load(logits_row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
        distance = distance_bits((x - best) * inverse)
        is_between = (distance >= low) & (distance < high)
        rooms = num_mine + tl.cumsum(is_between.to(tl.int32), axis=0) - 1
        tl.store(mine_ptr + rooms, distance, mask=is_between & (rooms < ROOM))
        num_mine += tl.sum(is_between.to(tl.int32), axis=0)
    programs = tl.arange(0, PROGRAMS)
    tl.store(counts_ptr + tl.program_id(0), num_mine)
    _wait_for_all(arrivals_ptr, num_passes * PROGRAMS, PROGRAMS)
    places_L = tl.arange(0, ROOM)
    upto_P = tl.cumsum(tl.load(counts_ptr + programs, cache_modifier=".cg"), axis=0)
    is_before_LP = upto_P[None, :] <= places_L[:, None]
    program_L = tl.sum(is_before_LP.to(tl.int32), axis=1)
    first_L = tl.max(tl.where(is_before_LP, upto_P[None, :], 0), axis=1)
    is_there_L = program_L < PROGRAMS
    distance_L = tl.load(
        list_ptr + program_L * ROOM + places_L - first_L,
        mask=is_there_L, other=INFINITY_BITS, cache_modifier=".cg",
    )  # fmt: skip
    return tl.sort(distance_L)


@triton.jit
def _reach(
    logits_row_ptr, target, by_count, low, high, high_value, best, inverse, partial_ptr, list_ptr, arrivals_ptr,
    num_passes,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, PROGRAMS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The nearest border within which weight (or number) reach the target: beyond `low`, up to `high`.

    Returns: the border, the weight (or number) within it, and the passes so far.
    """
    low_value = target * 0.0
    is_searching = high - low > 1
    while is_searching:
        step = (high - low + BORDERS - 1) // BORDERS
        borders_N = tl.minimum(low + step * tl.arange(0, BORDERS), high)
        num_passes += 1
        value_N = _weigh(
            logits_row_ptr, borders_N, by_count, best, inverse, partial_ptr, arrivals_ptr, num_passes,
            VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS,
        )  # fmt: skip
        index = tl.maximum(tl.sum((value_N < target).to(tl.int32), axis=0), 1)
        if index < BORDERS:
            high = at(borders_N, index)
            high_value = at(value_N, index)
        low = at(borders_N, index - 1)
        low_value = at(value_N, index - 1)
        # No weight between the borders is less than that at the farther one.
        least = tl.where(by_count, 1.0, tl.exp(-high.to(tl.float32, bitcast=True)))
        is_searching = (high - low > 1) & ((high_value - low_value) > 0.99 * ROOM * least)
    # Otherwise only ties are left, of which all are kept.
    if high - low > 1:
        num_passes += 1
        distance_L = _collect(
            logits_row_ptr, low, high, best, inverse, list_ptr, arrivals_ptr, num_passes,
            VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS, ROOM,
        )  # fmt: skip
        weight_L = tl.where(by_count, 1.0, tl.exp(-distance_L.to(tl.float32, bitcast=True)))
        weight_L = tl.where(distance_L < INFINITY_BITS, weight_L, 0.0).to(tl.float64)
        value_L = low_value + tl.cumsum(weight_L, axis=0)
        last = tl.sum((distance_L < INFINITY_BITS).to(tl.int32), axis=0) - 1
        place = tl.minimum(tl.sum((value_L < target).to(tl.int32), axis=0), tl.maximum(last, 0))
        high = tl.minimum(high, at(distance_L, place) + 1)
        high_value = low_value + tl.sum(tl.where(distance_L < high, weight_L, 0.0), axis=0)
    return high, high_value, num_passes


@triton.jit
def search_kernel(
    logits_ptr, rows_ptr, edits_ptr, unedited_ptr, stats_ptr, notes_ptr, partial_ptr, list_ptr, arrivals_ptr,
    tokens_ptr, drawn_ptr, row_stride,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PROGRAMS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """`PROGRAMS` programs per row; a row that is drawn already costs nothing."""
    row = tl.program_id(1).to(tl.int64)
    notes = notes_ptr + row * NOTES
    if tl.load(notes + IS_OPEN) > 0:
        logits_row_ptr = logits_ptr + row * row_stride
        partial_ptr += row * 2 * BORDERS * PROGRAMS
        list_ptr += row * (ROOM + 1) * PROGRAMS
        arrivals_ptr += row
        settings_ptr = rows_ptr + row * ROW_FIELDS
        inverse = tl.load(settings_ptr + INVERSE_TEMPERATURE).to(tl.float32)
        top_k = tl.load(settings_ptr + TOP_K).to(tl.int32)
        top_p = tl.load(settings_ptr + TOP_P)
        log_min_p = tl.load(settings_ptr + LOG_MIN_P).to(tl.float32)
        best = tl.load(notes + ROW_BEST).to(tl.float32)
        mass = tl.load(notes + ROW_SUM)

        num_passes = tl.program_id(0) * 0
        seen = tl.load(notes + SEEN).to(tl.int32)
        if (top_k > 0) & (top_k < VOCAB):
            count = top_k.to(tl.float64)
            high, num_within, num_passes = _reach(
                logits_row_ptr, count, True, seen, num_passes + INFINITY_BITS, mass * 0.0 + VOCAB, best, inverse,
                partial_ptr, list_ptr, arrivals_ptr, num_passes, VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS, ROOM,
            )  # fmt: skip
            num_passes += 1
            mass = at(
                _weigh(
                    logits_row_ptr, tl.zeros([BORDERS], tl.int32) + high, False, best, inverse, partial_ptr,
                    arrivals_ptr, num_passes, VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS,
                ),
                0,
            )  # fmt: skip
            # Of ties at the border only as many as top-k asks for count towards what top-p is a part of.
            tied = tl.exp(-(high - 1).to(tl.float32, bitcast=True)).to(tl.float64)
            mass -= tl.maximum(num_within - count, 0.0) * tl.where(high < INFINITY_BITS, tied, 0.0)
            seen = seen * 0
        else:
            # What lies farther than this has, all together, less weight than top-p leaves out.
            farthest = tl.log((VOCAB / ((1.0 - top_p) * mass)).to(tl.float32)) * 1.001 + 0.01
            high = tl.minimum(tl.maximum(distance_bits(farthest), seen + 1), INFINITY_BITS)
            high = tl.where(top_p < 1.0, high, INFINITY_BITS)
        if top_p < 1.0:
            high, _, num_passes = _reach(
                logits_row_ptr, top_p * mass, False, seen, high, mass, best, inverse,
                partial_ptr, list_ptr, arrivals_ptr, num_passes, VOCAB, CHUNK, NUM_CHUNKS, PROGRAMS, ROOM,
            )  # fmt: skip
        high = tl.minimum(high, distance_bits(log_min_p) + 1)

        entries = tl.arange(0, CHUNK)
        sums = stats_ptr + (row * PLANES + SUM) * NUM_CHUNKS
        for chunk in tl.range(tl.program_id(0), NUM_CHUNKS, PROGRAMS, num_stages=_STAGES):
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
