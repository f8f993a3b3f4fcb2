"""Machine code around `mma.sync` whose left operand is unpacked from quantised weights in registers.

A product of 16 outputs, 16 inputs and 8 tokens wants in thread `4 g + t` of a warp, of outputs `g` and
`g + 8`, two pairs of inputs, and of token `g` the same inputs. Which inputs these are is free: both sides
agree on those that a thread has fetched with 16 bytes of weights at a time.

Four bits: of a row's 64 bytes of a group thread `t` has bytes `16 t` to `16 t + 15`, words
`4 (t % 2)` to `+ 3` of the `t // 2`-th half. Their nibbles `i` are inputs `8 i + 4 (t % 2)` to `+ 3` of
the half, product `i`. A nibble needs no more than to be cut out: bf16 below 2^-125 is linear in its bits,
so that bits 0 to 3 of a half word are the number times 2^-133, and bits 4 to 7 times 2^-129. x is
multiplied by 2^80 or 2^76 instead, once for all rows of a warp; tensor cores take such small numbers as
they are. That stored numbers are 8 too large is mended by products of -8 and x, which are added to the sums.

Eight bits: of a row's 128 bytes thread `t` has bytes `16 t` to `16 t + 15` of the first 64 and of the
last. A word of four is two pairs, its even and its odd bytes: their bits moved under those of bf16 are the
number times 2^-120. x is in the same pairs, times 2^80.

So sums come out times 2^-53 and 2^-40 (`SUM_SCALES`). x of 2^47 and more would overflow.
Everything is exact but the additions, which are the tensor cores'.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from triton.experimental.gluon import language as gl

TILE_TOKENS = 8
PRODUCTS = 8  # with the same 16 rows in a group of 128 inputs
SUM_SCALES = (2.0**40, 2.0**53)  # of eight bits, of four

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
_NIBBLES = ("0x000F000F", "0x00F000F0")  # of even products, of odd ones
_MINUS_EIGHT = "0xC100C100"
_TO_SUMS = "0f25000000"  # 2^-53
_FACTORS = ("0x67806780", "0x65806580")  # 2^80, 2^76


def codes(pieces: Iterable[tuple[str, str]]) -> tuple[gl.constexpr, gl.constexpr]:
    """Machine codes and their operands, each by place."""
    codes, operands = zip(*pieces, strict=True)
    return gl.constexpr(codes), gl.constexpr(operands)


def _block(registers: str, lines: list[str]) -> str:
    return "{\n" + f".reg .b32 {registers};\n" + "".join(f"{line};\n" for line in lines) + "}"


def _outputs(count: int, kind: str = "r") -> list[str]:
    """Written before all inputs have been read."""
    return [f"=&{kind}"] * count


def _multiply(sums: int, left: tuple[str, str, str, str], right: tuple[str, str]) -> str:
    """Add a product to the four sums that begin at operand `sums`."""
    total = ", ".join(f"${sums + place}" for place in range(4))
    return f"{_MMA} {{{total}}}, {{{', '.join(left)}}}, {{{', '.join(right)}}}, {{{total}}}"


def _fetch(target: int, width: int, address: str, cache_hint: str = "") -> str:
    targets = ", ".join(f"${target + place}" for place in range(width))
    return f"ld.global{cache_hint}.v{width}.b32 {{{targets}}}, [{address}]"


def _fetches(count: int, lines: list[str], is_masked: bool) -> tuple[str, str]:
    """Into `count` operands from an address; masked ones are zero where the last operand is."""
    if not is_masked:
        return "".join(f"{line};\n" for line in lines), ",".join([*_outputs(count), "l"])
    zeros = [f"mov.b32 ${place}, 0" for place in range(count)]
    asked = [f"setp.ne.s32 wanted, ${count + 1}, 0", *zeros, *(f"@wanted {line}" for line in lines)]
    code = "{\n.reg .pred wanted;\n" + "".join(f"{line};\n" for line in asked) + "}"
    return code, ",".join([*_outputs(count), "l", "r"])


def fetch_words(*, is_masked: bool) -> tuple[str, str]:
    """Four words of weights, which are read once and by nobody else."""
    return _fetches(4, [_fetch(0, 4, "$4", ".nc.L1::no_allocate")], is_masked)


def minus_eights() -> tuple[str, str]:
    """The left operand of all -8, in four registers that the assembler does not know to be constant.

    Else it makes them anew for every product.
    """
    lines = [f"add.u32 eight, $4, {_MINUS_EIGHT}"]
    lines += [f"shfl.sync.idx.b32 ${place}, eight, {place}, 31, -1" for place in range(4)]
    return _block("eight", lines), ",".join([*_outputs(4), "r"])


def prepare_x(is_four_bits: bool) -> tuple[str, str]:
    """Registers of a group as products want them, 16 of 16; of four bits then what sums lack."""
    if is_four_bits:
        lines = [f"mov.b32 factor{odd}, {_FACTORS[odd]}" for odd in (0, 1)]
        lines += [f"mov.b32 ${16 + place}, 0" for place in range(4)]
        for product in range(PRODUCTS):
            x = (f"${20 + 2 * product}", f"${21 + 2 * product}")
            lines.append(_multiply(16, ("$36", "$37", "$38", "$39"), x))
            for place in (0, 1):
                lines.append(f"mul.rn.bf16x2 ${2 * product + place}, {x[place]}, factor{product % 2}")
        lines += [f"mul.rn.f32 ${16 + place}, ${16 + place}, {_TO_SUMS}" for place in range(4)]
        constraints = [*_outputs(16), *_outputs(4, "f"), *["r"] * 20]
        return _block("factor0, factor1", lines), ",".join(constraints)
    lines = [f"mov.b32 factor, {_FACTORS[0]}"]
    for product in range(PRODUCTS):
        first, second = 16 + 2 * product, 17 + 2 * product
        for place, halves in enumerate(("0x5410", "0x7632")):
            lines.append(f"prmt.b32 pair, ${first}, ${second}, {halves}")
            lines.append(f"mul.rn.bf16x2 ${2 * product + place}, pair, factor")
    return _block("factor, pair", lines), ",".join([*_outputs(16), *["r"] * 16])


def multiply_group(is_four_bits: bool, tiles: int) -> tuple[str, str]:
    """16 outputs by a group: the sums of `tiles` times 8 tokens from words of both rows and x."""
    sums = 4 * tiles
    words = 8 if is_four_bits else 16
    lines = [f"mov.b32 ${place}, 0" for place in range(sums)]
    for product in range(PRODUCTS):
        unpack = _cut_nibbles if is_four_bits else _move_bytes
        lines += unpack(product, sums)
        for tile in range(tiles):
            x = sums + words + 16 * tile + 2 * product
            left = ("pair00", "pair10", "pair01", "pair11")  # rows g and g + 8, then their second pairs
            lines.append(_multiply(4 * tile, left, (f"${x}", f"${x + 1}")))
    names = [f"{name}{row}{pair}" for name in ("bytes", "pair") for row in (0, 1) for pair in (0, 1)]
    constraints = [*_outputs(sums, "f"), *["r"] * (words + 16 * tiles)]
    return _block(", ".join(names), lines), ",".join(constraints)


def _cut_nibbles(product: int, first_word: int) -> list[str]:
    """Nibble `product` of two neighbouring words as a pair, of two such of each row."""
    lines = []
    for row in (0, 1):
        for pair in (0, 1):
            word, name = first_word + 4 * row + 2 * pair, f"{row}{pair}"
            if product % 2 == 0:
                byte = product // 2  # and what lies in the bytes between is cut off
                choice = f"0x{4 + byte}{4 + byte}{byte}{byte}"
                lines.append(f"prmt.b32 bytes{name}, ${word}, ${word + 1}, {choice}")
            lines.append(f"and.b32 pair{name}, bytes{name}, {_NIBBLES[product % 2]}")
    return lines


def _move_bytes(product: int, first_word: int) -> list[str]:
    """Word `product` of each row as its even and its odd bytes, exponents and fractions under bf16's."""
    lines = []
    for row in (0, 1):
        word = f"${first_word + 8 * row + product}"
        lines += [
            f"shl.b32 bytes{row}0, {word}, 4",
            f"shl.b32 bytes{row}1, {word}, 8",
            f"and.b32 bytes{row}0, bytes{row}0, 0x07F007F0",
            f"lop3.b32 pair{row}0, bytes{row}1, 0x80008000, bytes{row}0, 0xEA",
            f"shr.u32 bytes{row}0, {word}, 4",
            f"and.b32 bytes{row}0, bytes{row}0, 0x07F007F0",
            f"lop3.b32 pair{row}1, {word}, 0x80008000, bytes{row}0, 0xEA",
        ]
    return lines


@cache
def x_layouts(
    warps: int, tokens: int, *, is_four_bits: bool
) -> tuple[gl.DistributedLinearLayout, gl.DistributedLinearLayout]:
    """Who copies and who reads words of x in shared memory, `[warps * tokens * 2, 32]`, a group for each warp.

    A row is half a token's inputs. In four bits the halves of a token follow each other, in eight those of
    all tokens: so that threads that read at the same time have rows in different banks.
    """
    token_bits, warp_bits = tokens.bit_length() - 1, warps.bit_length() - 1
    token_step = 2 if is_four_bits else 1
    half = [1, 0] if is_four_bits else [tokens, 0]
    of_tokens = [[token_step << bit, 0] for bit in range(token_bits)]
    of_warps = [[2 * tokens << bit, 0] for bit in range(warp_bits)]
    missing = [[0, 0]] * (3 - token_bits)  # lanes read what others read
    if is_four_bits:
        registers, lanes = [[0, 1], [0, 4], [0, 8], [0, 16]], [[0, 2], half]
    else:
        registers, lanes = [[0, 1], [0, 2], [0, 4], half], [[0, 8], [0, 16]]
    shape = [warps * tokens * 2, 32]
    reading = gl.DistributedLinearLayout(registers, [*lanes, *of_tokens, *missing], of_warps, [], shape)
    rows = [[1 << bit, 0] for bit in range(token_bits + 1)]
    lanes = [[0, 4], [0, 8], [0, 16], *rows[:2]]
    lanes += [[0, 0]] * (5 - len(lanes))
    copying = gl.DistributedLinearLayout([[0, 1], [0, 2], *rows[2:]], lanes, of_warps, [], shape)
    return copying, reading


@cache
def scale_layout(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """Who reads scales `[warps, rows]` in shared memory: threads `4 g` to `4 g + 3` rows `g`, `g + 8`, …"""
    row_steps = [[0, 1 << bit] for bit in range(rows.bit_length() - 1)]
    warp_steps = [[1 << bit, 0] for bit in range(warps.bit_length() - 1)]
    lanes = [[0, 0], [0, 0], *row_steps[:3]]
    return gl.DistributedLinearLayout(row_steps[3:], lanes, warp_steps, [], [warps, rows])


@cache
def sum_layout(num_tiles: int, warps: int, *, is_gated: bool) -> gl.DistributedLinearLayout:
    """Of `[num_tiles, warps, 128]` a thread has all warps; neighbouring threads have neighbouring outputs.

    The 128 are the four sums of each thread of a product: bits 4 to 6 are its output `g`, bits 2 and 3 its
    `t`, bit 0 whether the output is `g + 8`, and bit 1 which of tokens `2 t` and `2 t + 1` it is. In the
    gated form `g` is a gate and `g + 8` its up, which a thread has both.
    """
    steps = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]]
    both = [steps.pop(0)] if is_gated else []
    lanes = [[0, 0, 16], [0, 0, 32], [0, 0, 64], *steps[:2]]
    tile_steps = [[1 << bit, 0, 0] for bit in range(num_tiles.bit_length() - 1)]
    spread = [*steps[2:], *tile_steps]
    num_bits = warps.bit_length() - 1
    warp_steps = [*spread[:num_bits], *[[0, 0, 0]] * (num_bits - len(spread))]
    registers = [*both, *([0, 1 << bit, 0] for bit in range(num_bits)), *spread[num_bits:]]
    return gl.DistributedLinearLayout(registers, lanes, warp_steps, [], [num_tiles, warps, 128])
