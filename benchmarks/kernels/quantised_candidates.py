"""The model's big linear layers, and the tiles that quantised_linear.py tries for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from kiln_nn.kernels.linear import LinearConfig, RegisterConfig, SpecialisedConfig
from kiln_nn.kernels.linear.choice_quantised import WEIGHT_BITS
from kiln_nn.kernels.linear.config import LinearKind, Tiling, weight_rows
from kiln_nn.kernels.quantised import Scheme

SCHEMES: tuple[Scheme, ...] = ("int4", "fp8")
MOST_ROWS_IN_REGISTERS = 32
FEWEST_SPECIALISED_ROWS = 32
MOST_SPECIALISED = 6
MULTIPROCESSORS = 132
# Where x is rounded: inputs of a slot, and kilobytes of the ring: three programs to a multiprocessor, two,
# or one.
RINGS = ((128, 72), (128, 108), (256, 108), (256, 200))
# Of layers whose inputs are not split: stripes, groups ahead, registers, and whether weights are staged.
WHOLE_ROWS: dict[Scheme, list[tuple[int, int, int, bool]]] = {
    "int4": [
        (2, 3, 128, False),
        (2, 2, 96, False),
        (1, 3, 96, False),
        (1, 2, 80, False),
        (2, 5, 0, True),
        (2, 3, 96, True),
        (2, 4, 96, True),
        (2, 3, 80, True),
        (1, 5, 0, True),
        (1, 4, 0, True),
        (1, 3, 0, True),
        (1, 3, 64, True),
    ],
    "fp8": [
        (1, 3, 96, False),
        (1, 5, 0, False),
        (2, 2, 0, False),
        (2, 3, 0, False),
        (1, 5, 0, True),
        (1, 4, 0, True),
        (1, 3, 0, True),
        (1, 2, 0, True),
        (2, 4, 0, True),
        (2, 3, 0, True),
        (2, 2, 0, True),
    ],
}
SHARED_MEMORY_BYTES = 227 * 1024


@dataclass(frozen=True)
class Layer:
    """One of the model's big linear layers; `outputs` are the weight's rows."""

    name: str
    outputs: int
    inputs: int
    kind: LinearKind
    count: int


LAYERS = (
    Layer("in_proj", 12_288, 2560, LinearKind.PLAIN, 24),
    Layer("qkv_proj", 10_240, 2560, LinearKind.PLAIN, 8),
    Layer("out_proj", 2560, 4096, LinearKind.PARTIAL, 32),
    Layer("gate_up", 18_432, 2560, LinearKind.GATED, 32),
    Layer("down_proj", 2560, 9216, LinearKind.PARTIAL, 32),
    Layer("head", 248_320, 2560, LinearKind.PLAIN, 1),
)


def candidates(scheme: Scheme, layer: Layer, num_rows: int, kernel: str) -> list[Tiling]:
    """Tiles to try of both kernels, or of the one with a ring or without."""
    found: list[Tiling] = []
    if kernel in ("all", "ring"):
        found += _ring_candidates(scheme, layer, num_rows)
    if kernel in ("all", "registers") and num_rows <= MOST_ROWS_IN_REGISTERS:
        found += _register_candidates(scheme, layer)
    if kernel in ("all", "specialised") and scheme == "int4" and num_rows >= FEWEST_SPECIALISED_ROWS:
        found += _specialised_candidates(layer, num_rows)
    return found


def _specialised_candidates(layer: Layer, num_rows: int) -> list[SpecialisedConfig]:
    """The tiles that should be fastest, by what a block of 128 inputs costs and by how programs fill waves."""
    halves = 2 if layer.kind is LinearKind.GATED else 1
    most = min(256, 1 << (num_rows - 1).bit_length())
    costs: dict[SpecialisedConfig, float] = {}
    shapes = product(sorted({most, most // 2, most // 4}), (2, 3), (1, 3), (64, 48))
    for tokens, groups, num_high, rows in shapes:
        # More sums are more than two groups, or three, have registers for.
        if tokens < 32 or tokens * num_high > {2: 256, 3: 192}[groups]:
            continue
        num_tiles = -(-layer.outputs // (rows * groups * num_high)) * -(-num_rows // tokens)
        for splits in range(1, 9 if layer.kind is LinearKind.PARTIAL else 2):
            config = SpecialisedConfig(tokens, rows // halves, groups, num_high, splits, 8)
            try:
                config = config.fit(layer.inputs, 2, SHARED_MEMORY_BYTES)
            except ValueError:
                continue
            num_blocks = -(-layer.inputs // 128 // splits)
            if num_blocks * (splits - 1) < layer.inputs // 128:
                costs[config] = _cycles(config, rows, num_blocks, num_tiles, num_rows)
    return sorted(costs, key=costs.__getitem__)[:MOST_SPECIALISED]


def rounded_specialised_candidates(layer: Layer, num_rows: int) -> list[SpecialisedConfig]:
    """The same over x in E4M3: single tiles, of 128 tokens at most."""
    halves = 2 if layer.kind is LinearKind.GATED else 1
    most = max(16, min(128, 1 << (num_rows - 1).bit_length()))
    costs: dict[SpecialisedConfig, float] = {}
    for tokens, groups, rows in product(sorted({most, max(64, most // 2)}), (2, 3), (64, 48, 40)):
        # Boxes are whole eights of rows.
        if tokens > most or rows // halves % 8:
            continue
        num_tiles = -(-layer.outputs // (rows * groups)) * -(-num_rows // tokens)
        for splits in range(1, 9 if layer.kind is LinearKind.PARTIAL else 2):
            config = SpecialisedConfig(tokens, rows // halves, groups, 1, splits, 12, x_bits=8)
            config = config.fit(layer.inputs, 2, SHARED_MEMORY_BYTES)
            num_blocks = -(-layer.inputs // 128 // splits)
            if num_blocks * (splits - 1) < layer.inputs // 128:
                costs[config] = _cycles(config, rows, num_blocks, num_tiles, num_rows)
    return sorted(costs, key=costs.__getitem__)[:MOST_SPECIALISED]


def _cycles(config: SpecialisedConfig, rows: int, num_blocks: int, num_tiles: int, num_rows: int) -> float:
    """A guess that ranks: a tile's products and its unpacking, which took as long as both together in
    measurements, or bytes at 30 a cycle; each wave's start and end; partial sums.
    """
    num_high = config.groups * config.tiles
    num_bytes = num_high * rows * 64 + 16 * config.x_bits * config.tokens
    block = max(num_high * (config.x_bits * config.tokens / 4 + 165), num_bytes / 30)
    waves = -(-num_tiles * config.splits // MULTIPROCESSORS)
    return waves * (num_blocks * block + 5000) + 3000 * config.splits * num_rows / 256


def _register_candidates(scheme: Scheme, layer: Layer) -> list[RegisterConfig]:
    """Splits and warps that leave none without work, and what so many registers or so much memory hold."""
    num_groups = layer.inputs // 128
    stripe = 8 if layer.kind is LinearKind.GATED else 16
    if layer.kind is not LinearKind.PARTIAL:
        return [
            RegisterConfig(stripe * stripes, 1, 4, ahead, registers, is_staged)
            for stripes, ahead, registers, is_staged in WHOLE_ROWS[scheme]
        ]
    found = []
    for stripes, warps, splits in product((1, 2, 4), (4, 8), range(1, 10)):
        steps, rest = divmod(num_groups, splits * warps)
        num_warps = layer.outputs // (stripe * stripes) * splits * warps
        words = stripes * (8 if scheme == "int4" else 16)  # of a thread, for a group
        if rest or not 2 <= steps <= 6 or not 9 <= num_warps / MULTIPROCESSORS <= 32:
            continue
        if words * steps <= 64:
            found.append(RegisterConfig(stripe * stripes, splits, warps, steps))
        if words * steps * warps * 128 <= 56 * 1024:
            found.append(RegisterConfig(stripe * stripes, splits, warps, steps, is_staged=True))
    return found


def _ring_candidates(scheme: Scheme, layer: Layer, num_rows: int) -> list[LinearConfig]:
    """Tiles to try: rows of a program, warps, inputs of a slot and kilobytes of its ring."""
    if num_rows <= 16:
        inputs = 256 if scheme == "int4" else 128
        shapes = [
            (64, 4, inputs, 72),
            (64, 4, inputs, 108),
            (64, 4, 2 * inputs, 72),
            (64, 4, 2 * inputs, 108),
        ]
        shapes += [(128, 4, inputs, 108), (128, 8, inputs, 108)]
    elif num_rows <= 128:
        shapes = [
            (64, 4, 128, 96),
            (96, 8, 128, 104),
            (96, 8, 128, 190),
            (128, 8, 128, 104),
            (128, 8, 128, 190),
        ]
    else:
        shapes = [(64, 4, 128, 190), (128, 8, 128, 104), (128, 8, 128, 190)]
    # More than 128 tokens want so many sums that four-bit weights are scaled first.
    most = 1 << (num_rows - 1).bit_length()
    tiles = {max(8, min(most, 256)), max(8, min(most, 128))} if num_rows <= 256 else {256}
    found = {}
    for tokens, (rows, warps, inputs, ring_kib) in product(sorted(tiles), shapes):
        outputs = rows // 2 if layer.kind is LinearKind.GATED else rows
        tile_rows = max(16 * warps, weight_rows(outputs, layer.kind))
        if tile_rows * tokens > 128 * 128 * (1 if scheme == "int4" and tokens == 128 else 2):
            continue
        line = inputs * (WEIGHT_BITS[scheme] * tile_rows + 16 * tokens)
        stages = min(12, ring_kib * 1024 * 8 // line)
        if stages < 2:
            continue
        for splits in _splits(layer, outputs, inputs, num_rows):
            config = LinearConfig(tokens, outputs, inputs, splits, warps, stages)
            found[config] = None
    return list(found)


def _splits(layer: Layer, outputs: int, inputs: int, num_rows: int) -> list[int]:
    if layer.kind is not LinearKind.PARTIAL:
        return [1]
    num_blocks = -(-layer.inputs // inputs)
    shares = (0.5, 1) if num_rows > 128 else (1, 2)
    num_tiles = -(-layer.outputs // outputs) * -(-num_rows // 256)
    wanted = {max(1, round(share * 132 / num_tiles)) for share in shares}
    return sorted({-(-num_blocks // -(-num_blocks // splits)) for splits in wanted})


def rounded_ring_candidates(layer: Layer, num_rows: int, *, promotes: bool) -> list[LinearConfig]:
    """Over x in E4M3: tiles that give every multiprocessor as many as any other, and two more."""
    found: dict[LinearConfig, None] = {}
    outputs = layer.outputs // 2 if layer.kind is LinearKind.GATED else layer.outputs
    most = 1 << (num_rows - 1).bit_length()
    for tokens in sorted({min(most, 256), min(most, 128)}):
        num_token_tiles = -(-num_rows // tokens)
        if layer.kind is LinearKind.PARTIAL:
            shared = ((64, 1), (64, 2), (80, 1), (80, 2), (128, 1))
            tiles = [(tile, _splits_of_waves(tile, layer, num_token_tiles, waves)) for tile, waves in shared]
        else:
            tiles = [
                (_balanced(outputs, waves * MULTIPROCESSORS // num_token_tiles), 1) for waves in (1, 2, 3)
            ]
            tiles.append((32 if layer.kind is LinearKind.GATED else 64, 1))
        for (tile, splits), warps, (inputs, ring_kib) in product(tiles, (4, 8), RINGS):
            tile_rows = max(64, weight_rows(tile, layer.kind))
            sums = tile_rows * tokens // (32 * warps)
            stages = min(12, ring_kib * 1024 // (inputs * (tile_rows + tokens)))
            num_blocks = -(-layer.inputs // inputs)
            is_wasteful = 16 * warps > tile_rows or stages * splits > 2 * num_blocks
            if stages < 2 or sums > 128 or is_wasteful:
                continue
            splits = -(-num_blocks // -(-num_blocks // splits))  # none without inputs
            can_promote = promotes and sums <= 64
            found[LinearConfig(tokens, tile, inputs, splits, warps, stages, 8, can_promote)] = None
    return list(found)


def _balanced(outputs: int, num_programs: int) -> int:
    """The smallest tile, of one or two boxes, of which so many programs are enough."""
    return next(tile for tile in range(8, 257, 8) if tile.bit_count() <= 2 and tile * num_programs >= outputs)


def _splits_of_waves(tile: int, layer: Layer, num_token_tiles: int, waves: int) -> int:
    """Parts of the inputs that make a tile's programs as many as multiprocessors, or twice as many."""
    num_tiles = -(-layer.outputs // tile) * num_token_tiles
    return max(1, waves * MULTIPROCESSORS // num_tiles)
