"""The warp of triton_hopper_specialised.py that fetches: slots of four-bit weights and of x, for all groups."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.triton_hopper_parts import ask_for_tile, ask_for_x


@gluon.jit
def _ask_for_weights(
    box_desc,
    rest_desc,
    ring,
    bar,
    slot,
    row,
    num_outputs,
    block,
    wanted,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    HALVES: gl.constexpr,
    TILES: gl.constexpr,
):
    """One slot's weights, `[TILES, HALVES * BOX + HALVES * REST, columns]`, and the bytes to wait for."""
    BOX: gl.constexpr = box_desc.block_type.shape[0]
    col = block * box_desc.block_type.shape[1]
    mbarrier.expect(bar, SLOT_BYTES, pred=wanted)
    for place in gl.static_range(TILES):
        tile = ring.index(slot * TILES + place)
        first = row + place * (BOX + REST)
        ask_for_tile(box_desc, rest_desc, tile, bar, first, col, num_outputs, wanted, REST, HALVES)


@gluon.jit
def fetch(
    fetching,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    X_REST: gl.constexpr,
    HALVES: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The fetching warp: weights before the predecessor has ended, then x, then slots as they are given back."""
    (
        box_desc,
        rest_desc,
        x_desc,
        x_rest_desc,
        w_ring,
        x_ring,
        full,
        empty,
        row,
        token,
        num_outputs,
        begin,
        count,
        shows_producers,
    ) = fetching
    for slot in gl.static_range(STAGES):
        _ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            full.index(slot),
            slot,
            row,
            num_outputs,
            begin + slot,
            slot < count,
            SLOT_BYTES,
            REST,
            HALVES,
            TILES,
        )
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    LINES: gl.constexpr = x_ring.shape[0] // STAGES  # of a slot's x, a token
    for slot in gl.static_range(STAGES):
        bar = full.index(slot)
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, begin + slot, slot < count, X_REST, LINES)
    for block in range(STAGES, count):
        place = block % STAGES
        # The slot's round before this one, number block // STAGES - 1.
        mbarrier.wait(empty.index(place), (block // STAGES - 1) & 1)
        again = full.index(place)
        _ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            again,
            place,
            row,
            num_outputs,
            begin + block,
            True,
            SLOT_BYTES,
            REST,
            HALVES,
            TILES,
        )
        ask_for_x(x_desc, x_rest_desc, x_ring, again, place, token, begin + block, True, X_REST, LINES)
