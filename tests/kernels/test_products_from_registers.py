"""What a warp's machine code multiplies when weights go straight into its registers, without a GPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kiln_nn.kernels.quantised.matrix import pack_int4

fragments = pytest.importorskip("kiln_nn.kernels.linear.triton_hopper_fragments")

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4  # rows or tokens, and columns, of a product's threads
SCHEMES = ["fp8", "int4"]


def _halves(words: np.ndarray) -> np.ndarray:
    """Pairs of bf16 as numbers, low first, `[32, 2]`."""
    bits = words.astype("<u4").view("<u2").reshape(-1, 2).astype("<u4") << 16
    return bits.view("<f4").astype(np.float64)


def _pairs(numbers: np.ndarray) -> np.ndarray:
    """Numbers that bf16 holds, `[32, 2]`, as words."""
    bits = numbers.astype("<f4").view("<u4")
    assert not (bits & 0xFFFF).any()
    return (bits[:, 0] >> 16 | bits[:, 1]).astype(np.uint32)


def _prmt(low: np.ndarray, high: np.ndarray, choice: np.ndarray) -> np.ndarray:
    source = np.stack([low, high], axis=1).astype("<u4").view(np.uint8)
    places = [int(choice[0]) >> 4 * place & 7 for place in range(4)]
    return np.ascontiguousarray(source[:, places]).view("<u4")[:, 0]


def _product(sums: list[np.ndarray], left: list[np.ndarray], right: list[np.ndarray]) -> list[np.ndarray]:
    """`mma.m16n8k16`, as the PTX manual lays out its registers."""
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for place, words in enumerate(left):
        for half in (0, 1):
            a[G + 8 * (place % 2), 2 * T + half + 8 * (place // 2)] = _halves(words)[:, half]
    for place, words in enumerate(right):
        for half in (0, 1):
            b[2 * T + half + 8 * place, G] = _halves(words)[:, half]
    product = a @ b
    return [total + product[G + 8 * (place // 2), 2 * T + place % 2] for place, total in enumerate(sums)]


OPERATIONS = {
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    "shl.b32": lambda a, places: a << places,
    "shr.u32": lambda a, places: a >> places,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: a & b | c,
    "add.u32": lambda a, b: a.astype(np.uint32) + b,
    "shfl.sync.idx.b32": lambda a, lane, clamp, mask: a[lane],
    "mul.rn.f32": lambda a, b: a * b.astype("<u4").view("<f4"),
    "mul.rn.bf16x2": lambda a, b: _pairs(_halves(a) * _halves(b)),
}


class Warp:
    """Runs a piece of machine code in 32 threads; its operands are numbered, outputs first."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.loaded: list[np.ndarray] = []

    def run(self, piece: tuple[str, str], *inputs: np.ndarray) -> list[np.ndarray]:
        code, constraints = piece
        kinds = constraints.split(",")
        outputs = [kind for kind in kinds if kind.startswith("=")]
        assert len(kinds) == len(outputs) + len(inputs)
        assert all(kind.startswith("=&") for kind in outputs), "inputs are read after outputs are written"
        registers = {f"${place}": value for place, value in enumerate(inputs, len(outputs))}
        for line in code.strip("{}\n").split(";"):
            if line.strip() and not line.strip().startswith(".reg"):
                self._step(line.strip(), registers)
        return [registers[f"${place}"] for place in range(len(outputs))]

    def _step(self, line: str, registers: dict[str, np.ndarray]) -> None:
        is_wanted = np.ones(32, bool)
        if line.startswith("@wanted "):
            line, is_wanted = line.removeprefix("@wanted "), registers["wanted"]
        operation, rest = line.split(None, 1)
        groups = [re.findall(r"[^\s,{}\[\]]+", group) for group in re.findall(r"\{[^}]*\}|[^,{}]+", rest)]
        operands = [group for group in groups if group]
        if operation.startswith("ld.global"):
            assert f".v{len(operands[0])}.b32" in operation
            self._load(operands[0], operands[1][0], is_wanted, registers)
        elif operation == "setp.ne.s32":
            registers["wanted"] = registers[operands[1][0]] != 0
        elif operation.startswith("mma.sync"):
            assert operation.endswith(".m16n8k16.row.col.f32.bf16.bf16.f32")
            targets = operands[0]
            left, right, sums = ([self._read(name, registers) for name in group] for group in operands[1:])
            registers |= dict(zip(targets, _product(sums, left, right), strict=True))
        else:
            (target,), *sources = operands
            table = OPERATIONS[operation]
            assert operation != "lop3.b32" or sources[3] == ["0xEA"]
            registers[target] = table(*(self._read(name, registers) for (name,) in sources))

    def _load(self, targets: list[str], place: str, is_wanted: np.ndarray, registers: dict) -> None:
        name, _, offset = place.partition("+")
        addresses = registers[name] + int(offset or 0)
        assert not (addresses % (4 * len(targets))).any(), "an access is aligned to its size"
        for step, target in enumerate(targets):
            bytes_ = np.where(is_wanted, addresses, 0)[:, None] + 4 * step + np.arange(4)
            words = np.ascontiguousarray(self.memory[bytes_]).view("<u4")[:, 0]
            registers[target] = np.where(is_wanted, words, registers.get(target, 0)).astype(np.uint32)
            self.loaded.append(bytes_[is_wanted].flatten())

    @staticmethod
    def _read(name: str, registers: dict[str, np.ndarray]) -> np.ndarray:
        if name in registers:
            return registers[name]
        value = int(name.replace("0f", "0x"), 0) & 0xFFFFFFFF  # 0f are the bits of a float
        return np.full(32, value, np.uint32)


def _draw(scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """A group of weights of 16 outputs: the numbers, and the bytes of each row."""
    generator = torch.Generator().manual_seed(0)
    if scheme == "int4":
        numbers = torch.randint(-8, 8, (16, 128), generator=generator)
        return numbers.double().numpy(), pack_int4(numbers).numpy().view(np.uint8)
    values = torch.randint(0, 256, (16, 128), generator=generator).to(torch.uint8)
    values[(values & 127) == 127] = 3  # what E4M3 has for NaN; 3 is one of its smallest
    numbers = values.view(torch.float8_e4m3fn).double().numpy()
    return numbers, values.numpy()


def _places(bases: list[list[int]], count: int) -> np.ndarray:
    """What each number below `count` stands for, `[count, dimensions]`, by the bits that it has."""
    bits = np.arange(count)[:, None] >> np.arange(len(bases)) & 1
    places = np.zeros((count, len(bases[0])), int)
    for bit, base in enumerate(bases):
        places ^= bits[:, bit : bit + 1] * np.array(base)
    return places


def _x_registers(x: torch.Tensor, is_four_bits: bool) -> list[np.ndarray]:
    """What the threads of a warp read of a group's x, `[8, 128]`."""
    _, reading = fragments.x_layouts(1, 8, is_four_bits=is_four_bits)
    words = x.view(torch.int32).numpy().view("<u4").reshape(8, 2, 32)  # tokens, halves, pairs
    lines = (words if is_four_bits else words.swapaxes(0, 1)).reshape(16, 32)
    registers, lanes = _places(reading.reg_bases, 16), _places(reading.lane_bases, 32)
    return [lines[tuple((lanes ^ register).T)] for register in registers]


@pytest.mark.parametrize("is_four_bits", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("warps", [4, 8])
def test_x_is_copied_and_read_once(warps, tokens, is_four_bits):
    shape = (warps * tokens * 2, 32)
    for layout in fragments.x_layouts(warps, tokens, is_four_bits=is_four_bits):
        bases = [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]
        assert len(layout.lane_bases) == 5
        assert 1 << len(layout.warp_bases) == warps
        places = _places([base for base in bases if any(base)], shape[0] * shape[1])
        assert len(np.unique(places, axis=0)) == shape[0] * shape[1]
        assert (places.max(axis=0) < shape).all()


@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_meets_its_input(scheme, tiles):
    four, (numbers, weights) = scheme == "int4", _draw(scheme)
    x = torch.randn(8 * tiles, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    line = weights.shape[1]
    warp = Warp(weights.flatten())

    words = []
    for row in (G, G + 8):
        for piece in range(line // 64):
            address = row * line + 64 * piece + 16 * T
            words += warp.run(fragments.fetch_words(is_masked=False), address)
    assert np.array_equal(np.sort(np.concatenate(warp.loaded)), np.arange(weights.size)), "every byte once"

    eights = warp.run(fragments.minus_eights(), G) if four else []
    ready, lacking = [], []
    for tile in range(tiles):
        raw = _x_registers(x[8 * tile : 8 * tile + 8].contiguous(), four)
        outputs = warp.run(fragments.prepare_x(four), *raw, *eights)
        ready += outputs[:16]
        lacking += outputs[16:] if four else [np.zeros(32)] * 4
    sums = warp.run(fragments.multiply_group(four, tiles), *words, *ready)

    expected = numbers @ x.double().numpy().T
    for place, (total, less) in enumerate(zip(sums, lacking, strict=True)):
        tokens = 8 * (place // 4) + 2 * T + place % 2
        outputs = G + 8 * (place % 4 // 2)
        scaled = (total + less) * fragments.SUM_SCALES[four]
        assert np.allclose(scaled, expected[outputs, tokens], rtol=1e-12, atol=1e-10)


def test_what_is_masked_is_zero_and_not_read():
    warp = Warp(np.full(4096, 7, np.uint8))
    is_wanted = LANES % 3 == 0
    address = np.where(is_wanted, 16 * LANES, 1 << 40)
    for words in warp.run(fragments.fetch_words(is_masked=True), address, is_wanted.astype(np.int32)):
        assert np.array_equal(words, np.where(is_wanted, 0x07070707, 0))


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("num_tiles", [1, 2, 4, 16])
def test_every_sum_has_a_thread(num_tiles, warps, is_gated):
    layout = fragments.sum_layout(num_tiles, warps, is_gated=is_gated)
    bases = [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]
    steps = sorted(tuple(base) for base in bases if any(base))
    expected = [(1 << bit, 0, 0) for bit in range(num_tiles.bit_length() - 1)]
    expected += [(0, 1 << bit, 0) for bit in range(warps.bit_length() - 1)]
    expected += [(0, 0, 1 << bit) for bit in range(7)]
    assert steps == sorted(expected)
    assert len(layout.lane_bases) == 5
    assert 1 << len(layout.warp_bases) == warps
    assert all(base[1] == 0 for base in [*layout.lane_bases, *layout.warp_bases]), "a thread adds up warps"
    assert ([0, 0, 1] in layout.reg_bases) is is_gated, "a gate and its up are one thread's"
