"""Quantised weights from Hopper's shared memory into the registers of a product, and the sums over them.

Warps read a box into the places that the left operand of warp-group products has in registers: a
thread has two neighbours of every eight inputs of a row. Four bits become bf16 by setting them under
the exponent of 128 and subtracting 136, E4M3 by moving its bits into place and multiplying by 2^120:
both exact. For products with E4M3 four bits become E4M3 themselves: its smallest numbers are whole ones
times 2^-9 up to 16, so that a byte's low bits are a magnitude as it stands.
"""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kiln_nn.kernels.linear.triton_hopper_parts import ask_for_weights, ask_for_x, barrier, source_rows


def _numbers_of_a_place(out: int) -> str:
    """Instructions: of the words' halves in `low` and `high`, place `out` as a pair of bf16."""
    half, shift = ("low", "high")[out // 4], 4 * (out % 4)
    source = "moved" if shift else half
    moving = f"shr.u32 moved, {half}, {shift};\n" if shift else ""
    return (
        f"{moving}lop3.b32 ${out}, {source}, 0x000F000F, 0x43004300, 0xEA;\n"
        f"sub.rn.bf16x2 ${out}, ${out}, least;\n"
    )


# Two neighbouring words, $8 and $9, as eight pairs of neighbouring inputs; $10 is the row's scale, twice.
_BEGIN = """.reg .b32 low, high, moved, least;
prmt.b32 low, $8, $9, 0x5410;
prmt.b32 high, $8, $9, 0x7632;
mov.b32 least, 0x43084308;
"""
_PLACES = "".join(map(_numbers_of_a_place, range(8)))
_SCALING = "".join(f"mul.rn.bf16x2 ${out}, ${out}, $10;\n" for out in range(8))
FOUR_BITS = gl.constexpr("{\n" + _BEGIN + _PLACES + "}")
FOUR_BITS_SCALED = gl.constexpr("{\n" + _BEGIN + _PLACES + _SCALING + "}")
_OUTPUTS = gl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")
_OUTPUTS_SCALED = gl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r")
_PAIRS = gl.constexpr((gl.bfloat16,) * 8)

# $2 is a pair of neighbours.
EIGHT_BITS = gl.constexpr(
    """{
.reg .b32 bytes, pair, scale;
cvt.u32.u16 bytes, $2;
prmt.b32 bytes, bytes, 0, 0x1404;
shr.u32 pair, bytes, 4;
and.b32 pair, pair, 0x07F007F0;
lop3.b32 pair, bytes, 0x80008000, pair, 0xEA;
mov.b32 scale, 0x7B807B80;
mul.rn.bf16x2 pair, pair, scale;
mov.b32 {$0, $1}, pair;
}"""
)


def _numbers_of_a_word(word: int) -> str:
    """Instructions: of input `word` its even and its odd places as four E4M3 each, times 2^-9.

    What is stored is the number plus eight: its distance from eight, and a sign where bit 3 is not set.
    """
    even = 4 * (word // 2) + word % 2
    odd, source = even + 2, 8 + word
    return (
        f"and.b32 ${even}, ${source}, 0x0F0F0F0F;\n"
        f"shr.u32 moved, ${source}, 4;\n"
        f"and.b32 ${odd}, moved, 0x0F0F0F0F;\n"
        f"shl.b32 moved, ${source}, 4;\n"
        f"vabsdiff4.u32.u32.u32 ${even}, ${even}, eights, zero;\n"
        f"vabsdiff4.u32.u32.u32 ${odd}, ${odd}, eights, zero;\n"
        f"lop3.b32 ${even}, ${even}, moved, 0x80808080, 0xF2;\n"
        f"lop3.b32 ${odd}, ${odd}, ${source}, 0x80808080, 0xF2;\n"
    )


# Words t and t + 4 of a row, $8 and $9, and of the row eight below, $10 and $11; even places are the first
# 32 inputs of a product, odd ones the others.
FOUR_BITS_AS_E4M3 = gl.constexpr(
    "{\n.reg .b32 moved, eights, zero;\nmov.b32 eights, 0x08080808;\nmov.b32 zero, 0;\n"
    + "".join(map(_numbers_of_a_word, range(4)))
    + "}"
)
_OUTPUTS_AS_E4M3 = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 4))
_QUADS = gl.constexpr((gl.int32,) * 2)
# The same registers again, as numbers.
_AS_NUMBERS = gl.constexpr("\n".join(f"mov.b32 ${place}, ${8 + place};" for place in range(8)))
_OUTPUTS_AS_NUMBERS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))
_NUMBERS = gl.constexpr((gl.float8e4nv,) * 8)


@gluon.jit
def _in_order(p0, p1, p2, p3, p4, p5, p6, p7):
    """Numbers by their place in a word, each `[ROWS, 16]`, as two tensors `[ROWS, 64]` by input."""
    ROWS: gl.constexpr = p0.shape[0]
    lower = gl.join(gl.join(p0, p1), gl.join(p2, p3))
    upper = gl.join(gl.join(p4, p5), gl.join(p6, p7))
    # Of every 64 inputs number 8 i + w is at place i of word w.
    places = gl.join(lower, upper).reshape([ROWS, 2, 8, 2, 2, 2])
    first, last = gl.permute(places, (0, 5, 4, 3, 2, 1)).split()
    return first.reshape([ROWS, 64]), last.reshape([ROWS, 64])


@gluon.jit
def four_bits(tile, PLACES: gl.constexpr):
    """bf16 of the numbers in a tile of words, `[ROWS, 16]`: the first and the last 64 inputs of a box."""
    words = tile.load(PLACES)
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        FOUR_BITS, _OUTPUTS, [words], dtype=_PAIRS, is_pure=True, pack=2
    )
    return _in_order(p0, p1, p2, p3, p4, p5, p6, p7)


@gluon.jit
def four_bits_scaled(tile, scales, PLACES: gl.constexpr):
    """The same times the rows' scales, `[ROWS, 1]` in shared memory, rounded to bf16."""
    words = tile.load(PLACES)
    scale = scales.load(PLACES).to(gl.bfloat16)
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        FOUR_BITS_SCALED, _OUTPUTS_SCALED, [words, scale], dtype=_PAIRS, is_pure=True, pack=2
    )
    return _in_order(p0, p1, p2, p3, p4, p5, p6, p7)


@gluon.jit
def eight_bits(tile, PLACES: gl.constexpr):
    """bf16 of the numbers in a tile of pairs of E4M3, `[ROWS, 64]`: the first and the last 64 inputs."""
    ROWS: gl.constexpr = tile.shape[0]
    low, high = gl.inline_asm_elementwise(
        EIGHT_BITS,
        "=h,=h,h",
        [tile.load(PLACES)],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    inputs = gl.join(low, high).reshape([ROWS, 2, 64])
    return gl.permute(inputs, (0, 2, 1)).split()


@gluon.jit
def halves_of(words):
    """Words of the first and of the last 64 inputs of a box."""
    ROWS: gl.constexpr = words.shape[0]
    HALF: gl.constexpr = words.shape[1] // 2
    return gl.permute(words.reshape([ROWS, 2, HALF]), (0, 2, 1)).split()


@gluon.jit
def four_bits_half(words, scale, SCALED: gl.constexpr):
    """bf16 of the numbers in words of 64 inputs, `[ROWS, 8]`; times the rows' `scale`, if `SCALED`."""
    ROWS: gl.constexpr = words.shape[0]
    if SCALED:
        p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
            FOUR_BITS_SCALED, _OUTPUTS_SCALED, [words, scale], dtype=_PAIRS, is_pure=True, pack=2
        )
    else:
        p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
            FOUR_BITS, _OUTPUTS, [words], dtype=_PAIRS, is_pure=True, pack=2
        )
    lower = gl.join(gl.join(p0, p1), gl.join(p2, p3))
    upper = gl.join(gl.join(p4, p5), gl.join(p6, p7))
    # Number 8 i + w is at place i of word w.
    numbers = gl.join(lower, upper).reshape([ROWS, 8, 2, 2, 2])
    return gl.permute(numbers, (0, 4, 3, 2, 1)).reshape([ROWS, 64])


@gluon.jit
def four_bits_as_e4m3(words):
    """Of words of 64 inputs, `[64, 8]` in `word_places`, the numbers times 2^-9 in E4M3, four in an int32.

    They are two tensors of the words' shape, in whose registers `left_operand` finds them: numbers would be
    taken apart where a loop turns round.
    """
    return gl.inline_asm_elementwise(
        FOUR_BITS_AS_E4M3, _OUTPUTS_AS_E4M3, [words], dtype=_QUADS, is_pure=True, pack=4
    )


@gluon.jit
def left_operand(quads, OPERAND: gl.constexpr):
    """Of `four_bits_as_e4m3` the left operand of a product, `[64, 64]`, inputs in the order of `word_order`."""
    q0, q1, q2, q3, q4, q5, q6, q7 = gl.inline_asm_elementwise(
        _AS_NUMBERS, _OUTPUTS_AS_NUMBERS, [quads[0], quads[1]], dtype=_NUMBERS, is_pure=True, pack=4
    )
    # A thread's four words are places in a register now; which register it is, the row (8), the product's
    # step and its half. Before: row 32 16, 8, 4 2 1; word 4, 2 1; register.
    lower = gl.join(gl.join(q0, q4), gl.join(q2, q6))
    upper = gl.join(gl.join(q1, q5), gl.join(q3, q7))
    parts = gl.join(lower, upper).reshape([4, 2, 8, 2, 4, 2, 2, 2])
    numbers = gl.permute(parts, (0, 5, 2, 6, 7, 4, 1, 3)).reshape([64, 64])
    return gl.convert_layout(numbers, OPERAND, assert_trivial=True)


@gluon.jit
def fetch_group_scales(
    scales_ptr,
    scale_stride,
    shared,
    row,
    num_outputs,
    first,
    num_groups,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    GATED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Scales of a program's rows and groups into shared memory, `[GROUPS, ROWS]`."""
    GROUPS: gl.constexpr = shared.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [num_warps, 1], [1, 0])
    lanes = gl.arange(0, shared.shape[1], gl.SliceLayout(1, layout))
    groups = gl.arange(0, GROUPS, gl.SliceLayout(0, layout))
    rows, is_there = source_rows(lanes, row, num_outputs, BOX, REST, GATED)
    mask = is_there[:, None] & (groups < num_groups)[None, :]
    places = rows.to(gl.int64)[:, None] * scale_stride + (first + groups)[None, :]
    scales = gl.load(scales_ptr + places, mask=mask, other=0.0)
    shared.store(gl.permute(scales, (1, 0)))


@gluon.jit
def multiply_quantised(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    w_ring,
    x_ring,
    scales,
    bars,
    row,
    token,
    num_outputs,
    begin,
    count,
    PLACES: gl.constexpr,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    X_REST: gl.constexpr,
    HALVES: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    SCALED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`[ROWS, TOKENS]` sums over `count` blocks of inputs, those of four bits scaled.

    With `SCALED` their weights are, not the sums of groups, which want as many registers again.
    """
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    for block in range(count):
        slot = block % STAGES
        bar = bars.index(slot)
        mbarrier.wait(bar, (block // STAGES) & 1)
        # What one block has in flight ends within it: the next one writes the same registers.
        before = total
        for sub in gl.static_range(SUBS):
            place = slot * SUBS + sub
            if SCALED:
                group = scales.index(block * SUBS + sub)
                first, last = four_bits_scaled(w_ring.index(place), group, PLACES)
            elif FOUR_BITS:
                first, last = four_bits(w_ring.index(place), PLACES)
            else:
                first, last = eight_bits(w_ring.index(place), PLACES)
            first = gl.convert_layout(first, operand)
            last = gl.convert_layout(last, operand)
            x_first = x_ring.index(2 * place).permute((1, 0))
            x_last = x_ring.index(2 * place + 1).permute((1, 0))
            if FOUR_BITS and not SCALED:
                part = warpgroup_mma(first, x_first, gl.zeros_like(total), use_acc=False, is_async=True)
                part = warpgroup_mma(last, x_last, part, is_async=True)
                if sub > 0:
                    before = warpgroup_mma_wait(2, deps=[before])
                    scale = scales.index(block * SUBS + sub - 1).load(layout).to(gl.float32)
                    total += before * scale
                before = part
            else:
                total = warpgroup_mma(first, x_first, total, is_async=True)
                total = warpgroup_mma(last, x_last, total, is_async=True)
        if FOUR_BITS and not SCALED:
            before = warpgroup_mma_wait(0, deps=[before])
            scale = scales.index(block * SUBS + SUBS - 1).load(layout).to(gl.float32)
            total += before * scale
        else:
            total = warpgroup_mma_wait(0, deps=[total])
        barrier()  # all warps are done with the slot
        later = block + STAGES
        wanted = later < count
        where = begin + later
        ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            bar,
            slot,
            row,
            num_outputs,
            where,
            wanted,
            SLOT_BYTES,
            REST,
            HALVES,
            SUBS,
        )
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, where, wanted, X_REST, 2 * SUBS)
    return total


@cache
def places(rows: int, warps: int, *, is_four_bits: bool) -> gl.DistributedLinearLayout:
    """Which registers and threads hold what of a tile: words of four-bit numbers, or pairs of E4M3.

    A thread of a warp-group product has rows `g` and `g + 8` of sixteen and of every eight inputs
    two neighbours, `2 t` and `2 t + 1`; and so of every eight words.
    """
    inner = [[0, 1], [0, 8]] if is_four_bits else [[0, step] for step in (4, 8, 16, 32)]
    columns, lanes = (16, [[0, 2], [0, 4]]) if is_four_bits else (64, [[0, 1], [0, 2]])
    row_steps = [1 << bit for bit in range(rows.bit_length() - 1)]
    warp_steps = [step for step in row_steps[4:] if step < 16 * warps]
    registers = [*inner, [8, 0], *([step, 0] for step in row_steps[4:] if step >= 16 * warps)]
    lanes = [*lanes, [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[step, 0] for step in warp_steps], [], [rows, columns]
    )


@cache
def half_places() -> gl.DistributedLinearLayout:
    """The same of half a tile of four bits and 64 rows, for one warp group."""
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, 8])


@cache
def word_places(columns: int) -> gl.DistributedLinearLayout:
    """Which thread of a warp group unpacks which words to E4M3 of a tile of 64 rows, or half of one.

    Thread `t` of the four that have a row words `t` and `t + 4` of every eight.
    """
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    others = [[0, step] for step in (8,) if step < columns]
    return gl.DistributedLinearLayout([[0, 4], *others, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, columns])
