"""What the few machine instructions that unpack weights compute, bit by bit, without a GPU."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

import kiln_nn.kernels.linear

SOURCE = Path(kiln_nn.kernels.linear.__file__).with_name("triton_hopper_unpack.py").read_text()
FOUR_BITS, FOUR_BITS_SCALED, EIGHT_BITS = re.findall(r'"""\{\n(.*?)\}"""', SOURCE, re.DOTALL)


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
    "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "sub.rn.bf16x2": _pairwise(lambda a, b: a - b),
    "mul.rn.bf16x2": _pairwise(lambda a, b: a * b),
}


def _run(code: str, **inputs: int) -> tuple[float, float]:
    """The two bf16 results of a piece of PTX; `$2` and on are `inputs` in their order."""
    registers = {f"${place}": value for place, value in enumerate(inputs.values(), 2)}

    def read(operand: str) -> int:
        if "+" in operand:
            low, high = (read(part) for part in operand.split("+"))
            return low | high << 16
        return registers[operand] if operand in registers else int(operand, 0)

    for line in code.strip().splitlines():
        operation, operands = line.strip().rstrip(";").split(None, 1)
        if operation == ".reg":
            continue
        # A pair in braces is one operand.
        pairs = re.sub(r"\{(\S+), (\S+)\}", r"\1+\2", operands)
        target, *sources = pairs.split(", ")
        result = OPERATIONS[operation](*map(read, sources))
        places = target.split("+")
        registers |= dict(zip(places, _halves(result) if len(places) == 2 else [result], strict=True))
    return _to_float(registers["$0"]), _to_float(registers["$1"])


@pytest.mark.parametrize("thread", range(4))
def test_a_thread_takes_its_two_numbers_of_a_word(thread):
    for byte in range(256):
        word = 0x5A_C3_0F_96 & ~(0xFF << 8 * thread) | byte << 8 * thread
        expected = (float((byte & 15) - 8), float((byte >> 4) - 8))
        assert _run(FOUR_BITS, word=word, choice=thread | 0x4440) == expected
        scale = _to_bf16(0.0123)
        scaled = tuple(_to_float(_to_bf16(number * _to_float(scale))) for number in expected)
        assert _run(FOUR_BITS_SCALED, word=word, choice=thread | 0x4440, scale=scale) == scaled


def test_every_number_of_eight_bits():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    for first, value in enumerate(values):
        second = (first * 37 + 11) % 256
        if first & 127 != 127 and second & 127 != 127:  # what E4M3 has for NaN
            assert _run(EIGHT_BITS, pair=first | second << 8) == (value, values[second])
