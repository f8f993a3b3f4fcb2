"""What the few machine instructions that unpack weights compute, bit by bit, without a GPU."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from kiln_nn.kernels.quantised.matrix import pack_int4

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
    assert table == 0xEA
    return a & b | c


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
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "sub.rn.bf16x2": _pairwise(lambda a, b: a - b),
    "mul.rn.bf16x2": _pairwise(lambda a, b: a * b),
}


def _run(code, num_outputs: int, *inputs: int) -> list[float]:
    """The bf16 results of a piece of PTX whose inputs are numbered after its outputs."""
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
    results = [registers[f"${place}"] for place in range(num_outputs)]
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
