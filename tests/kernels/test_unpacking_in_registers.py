"""What the few machine instructions that unpack weights compute, bit by bit, without a GPU."""

from __future__ import annotations

import re
import struct
from itertools import product

import pytest
import torch

from kiln_nn.kernels.quantised.matrix import pack_int4, word_order

unpack = pytest.importorskip("kiln_nn.kernels.linear.triton_hopper_unpack")


def _to_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def _to_bf16(value: float) -> int:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) & 0xFFFF


def _halves(word: int) -> tuple[int, int]:
    return word & 0xFFFF, word >> 16


def _prmt(low: int, high: int, choice: int) -> int:
    source = struct.pack("<II", low, high)
    return int.from_bytes(bytes(source[choice >> 4 * place & 7] for place in range(4)), "little")


def _lop3(a: int, b: int, c: int, table: int) -> int:
    assert table in (0xEA, 0xF2)
    return a & b | c if table == 0xEA else a | ~b & c


def _distances(a: int, b: int, zero: int) -> int:
    assert zero == 0
    pairs = zip(struct.pack("<I", a), struct.pack("<I", b), strict=True)
    return int.from_bytes(bytes(abs(left - right) for left, right in pairs), "little")


def _pairwise(operation):
    def compute(left: int, right: int) -> int:
        parts = zip(_halves(left), _halves(right), strict=True)
        low, high = (_to_bf16(operation(_to_float(a), _to_float(b))) for a, b in parts)
        return low | high << 16

    return compute


OPERATIONS = {
    "cvt.u32.u16": lambda a: a,
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    "shr.u32": lambda a, places: a >> places,
    "shl.b32": lambda a, places: a << places & 0xFFFFFFFF,
    "vabsdiff4.u32.u32.u32": _distances,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "sub.rn.bf16x2": _pairwise(lambda a, b: a - b),
    "mul.rn.bf16x2": _pairwise(lambda a, b: a * b),
}


def _run_words(code, num_outputs: int, *inputs: int) -> list[int]:
    """The results of a piece of PTX whose inputs are numbered after its outputs."""
    registers = {f"${place}": value for place, value in enumerate(inputs, num_outputs)}

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in code.value.strip("{}\n").splitlines():
        operation, operands = line.strip().rstrip(";").split(None, 1)
        if operation == ".reg":
            continue
        # A pair in braces is one operand.
        target, *sources = re.sub(r"\{(\S+), (\S+)\}", r"\1+\2", operands).split(", ")
        result = OPERATIONS[operation](*map(read, sources))
        places = target.split("+")
        registers |= dict(zip(places, _halves(result) if len(places) == 2 else [result], strict=True))
    return [registers[f"${place}"] for place in range(num_outputs)]


def _run(code, num_outputs: int, *inputs: int) -> list[float]:
    """The same in bf16, of eight pairs or of single ones."""
    results = _run_words(code, num_outputs, *inputs)
    if num_outputs == 8:
        return [_to_float(half) for value in results for half in _halves(value)]
    return [_to_float(value) for value in results]


def test_two_words_become_eight_pairs_of_neighbours():
    generator = torch.Generator().manual_seed(0)
    scale = _to_bf16(0.0123)
    for _ in range(20):
        numbers = torch.randint(-8, 8, (1, 64), generator=generator)
        words = [word & 0xFFFFFFFF for word in pack_int4(numbers)[0].tolist()]
        for thread in range(4):
            # Of every eight inputs the two that a thread of a product multiplies.
            expected = numbers.view(8, 4, 2)[:, thread].flatten().tolist()
            pair = words[2 * thread : 2 * thread + 2]
            assert _run(unpack.FOUR_BITS, 8, *pair) == expected
            scaled = [_to_float(_to_bf16(number * _to_float(scale))) for number in expected]
            assert _run(unpack.FOUR_BITS_SCALED, 8, *pair, scale | scale << 16) == scaled


def test_every_number_of_eight_bits():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    for first, value in enumerate(values):
        second = (first * 37 + 11) % 256
        if first & 127 != 127 and second & 127 != 127:  # what E4M3 has for NaN
            assert _run(unpack.EIGHT_BITS, 2, first | second << 8) == [value, values[second]]


def test_four_words_become_the_left_operand_in_e4m3():
    """What a thread has of 16 rows and 64 inputs: of a step rows `g`, `g + 8`, and then 16 inputs on."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        numbers = torch.randint(-8, 8, (2, 64), generator=generator)
        words = [[word & 0xFFFFFFFF for word in row] for row in pack_int4(numbers).tolist()]
        ordered = word_order(numbers)
        for thread in range(4):
            pair = slice(thread, None, 4)
            registers = _run_words(unpack.FOUR_BITS_AS_E4M3, 8, *words[0][pair], *words[1][pair])
            for row, step, half in product(range(2), range(2), range(2)):
                quad = struct.pack("<I", registers[4 * row + 2 * step + half])
                values = torch.tensor(list(quad), dtype=torch.uint8).view(torch.float8_e4m3fn).float() * 2**9
                first = 32 * step + 16 * half + 4 * thread
                assert torch.equal(values, ordered[row, first : first + 4].float())
