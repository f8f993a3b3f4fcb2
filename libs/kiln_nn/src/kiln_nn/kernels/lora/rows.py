"""Which tokens of a step use which adapters, in the form the kernels walk over.

Tokens, sorted by their adapters, are cut into *tiles* of up to `M`. A token stands in one tile, so
whoever computes a tile owns its outputs. A tile has *members*, the adapters in it, and *layers*: in
the first every token's first adapter is at work, in the second the second of those that have one.
What the shrink computes at a time is an *entry*: up to `N` neighbours in a layer that share an
adapter. All numbers lie in one buffer, so that one copy brings them to the device, and what is not in
use says so, so that a captured graph serves any step.

Legend: `B` tiles, `M` tokens of a tile, `L` layers of all tiles, `C` members of all tiles, `E`
entries, `N` tokens of an entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

NOTHING = -1
_ENTRY_HEAD = 4
_TILE_HEAD = 5
_MOST_TILE_TOKENS = 64
_DECODE_ENTRY_TOKENS = 16


@dataclass(frozen=True)
class AdapterUse:
    """One adapter of a token: its place in the tables, its rank and the factor on `B A x`."""

    table_index: int
    rank: int
    scale: float


@dataclass(frozen=True)
class TokenGroup:
    """Tokens that use the same adapters with the same scales; no adapter twice."""

    tokens: Sequence[int]
    uses: tuple[AdapterUse, ...]


@dataclass(frozen=True)
class RowsShape:
    """How much a buffer has room for."""

    tile_tokens: int
    entry_tokens: int
    num_tiles: int
    num_layers: int
    num_members: int
    num_entries: int
    # Programs that share the entries: as many as there are when every token has one adapter.
    num_walkers: int

    @classmethod
    def for_any(cls, num_tokens: int, num_adapters: int) -> RowsShape:
        """Room for any mixture of `num_adapters` adapters over so many tokens of decoding."""
        tile_tokens = 16
        while tile_tokens < min(num_tokens, _MOST_TILE_TOKENS):
            tile_tokens *= 2
        num_tiles = -(-num_tokens // tile_tokens)
        return cls(
            tile_tokens,
            _DECODE_ENTRY_TOKENS,
            num_tiles,
            num_tiles * num_adapters,
            num_tiles * num_adapters,
            num_tokens * num_adapters,
            min(num_tokens, -(-num_tokens // _DECODE_ENTRY_TOKENS) + num_adapters),
        )

    @property
    def members_at_once(self) -> int:
        """How many adapters of a tile are worth one product: what a tile has, eight at the most."""
        per_tile = -(-self.num_members // max(1, self.num_tiles))
        return 1 if per_tile == 1 else 2 if per_tile == 2 else 4 if per_tile <= 4 else 8

    @property
    def entry_words(self) -> int:
        return _ENTRY_HEAD + self.entry_tokens

    @property
    def num_words(self) -> int:
        """Size of the buffer in 4-byte words."""
        return self.words_used(self.num_entries)

    def words_used(self, num_entries: int) -> int:
        """How far the buffer is written for so many entries, which come last."""
        tiles = (_TILE_HEAD + self.tile_tokens) * self.num_tiles
        layers = 2 * self.tile_tokens * self.num_layers
        return _ENTRY_HEAD + tiles + 2 * self.num_members + layers + num_entries * self.entry_words


@dataclass(frozen=True)
class LoraRows:
    """Views into one int32 buffer on the device.

    `counts`: the number of entries, and three words without meaning.
    `tiles_B5`: first layer of a tile and the one behind its last, first member and the one behind, and
    how many blocks of 16 ranks the highest rank among them takes.
    `tokens_BM`: places in x and y, NOTHING behind the last one of a tile.
    `adapters_C`, `ranks_C`: a member's place in the tables, and its rank.
    `layers_L2M`: for each token of the tile, which of the tile's members it uses in this layer
    (NOTHING: none), and the float32 bits of its factor.
    `entries_EW`: adapter, rank, layer, place of the first token in its tile; then the tokens.
    """

    shape: RowsShape
    counts: torch.Tensor
    tiles_B5: torch.Tensor
    tokens_BM: torch.Tensor
    adapters_C: torch.Tensor
    ranks_C: torch.Tensor
    layers_L2M: torch.Tensor
    entries_EW: torch.Tensor

    @classmethod
    def over(cls, buffer: torch.Tensor, shape: RowsShape) -> LoraRows:
        """Views into a buffer of `shape.num_words` int32 words."""
        counts, tiles_B5, tokens_BM, adapters_C, ranks_C, layers_L2M, entries_EW = _split(buffer, shape)
        return cls(shape, counts, tiles_B5, tokens_BM, adapters_C, ranks_C, layers_L2M, entries_EW)

    @classmethod
    def of(
        cls, groups: Sequence[TokenGroup], *, is_prefill: bool = False, device: torch.device | str = "cpu"
    ) -> LoraRows:
        """Rows of exactly these groups, copied to the device."""
        words, shape = pack_exactly(groups, is_prefill=is_prefill)
        return cls.over(torch.from_numpy(words).to(device), shape)


def pack_exactly(groups: Sequence[TokenGroup], *, is_prefill: bool) -> tuple[np.ndarray, RowsShape]:
    """The words of a buffer for exactly these groups; long runs of prefill get entries of their length."""
    num_tokens = sum(len(group.tokens) for group in groups)
    shape = RowsShape.for_any(max(1, num_tokens), 1)
    entry_tokens = shape.tile_tokens if is_prefill else shape.entry_tokens
    tiles = _make_tiles(groups, shape.tile_tokens)
    num_entries = sum(len(list(tile.entries(entry_tokens))) for tile in tiles)
    shape = RowsShape(
        shape.tile_tokens,
        entry_tokens,
        len(tiles),
        sum(tile.num_layers for tile in tiles),
        sum(len(tile.members) for tile in tiles),
        num_entries,
        num_entries,
    )
    return _pack_tiles(tiles, shape), shape


def pack_groups(groups: Sequence[TokenGroup], shape: RowsShape) -> np.ndarray:
    """The words of a buffer of the given shape, as far as it is used."""
    return _pack_tiles(_make_tiles(groups, shape.tile_tokens), shape)


@dataclass(frozen=True)
class _Run:
    """Neighbours in a tile with the same adapters; `scales` has a row for each of the adapters."""

    start: int
    tokens: np.ndarray
    uses: tuple[AdapterUse, ...]
    scales: np.ndarray


@dataclass
class _Tile:
    runs: list[_Run] = field(default_factory=list)
    num_tokens: int = 0
    num_layers: int = 0
    # Table index -> rank, in the order of the members.
    members: dict[int, int] = field(default_factory=dict)

    def add(self, tokens: np.ndarray, uses: tuple[AdapterUse, ...], scales: np.ndarray) -> None:
        self.runs.append(_Run(self.num_tokens, tokens, uses, scales))
        self.num_tokens += len(tokens)
        self.num_layers = max(self.num_layers, len(uses))
        self.members.update((use.table_index, use.rank) for use in uses)

    def entries(self, entry_tokens: int) -> Iterator[tuple[AdapterUse, int, int, np.ndarray]]:
        """Adapter, layer, place of the first token, tokens."""
        for run in self.runs:
            for layer, use in enumerate(run.uses):
                for start in range(0, len(run.tokens), entry_tokens):
                    yield use, layer, run.start + start, run.tokens[start : start + entry_tokens]


def _make_tiles(groups: Sequence[TokenGroup], tile_tokens: int) -> list[_Tile]:
    """Tiles filled to the brim with the tokens that use adapters, in the order of their adapters."""
    by_adapters: dict[tuple[int, ...], list[TokenGroup]] = {}
    for group in groups:
        if group.uses and len(group.tokens):
            by_adapters.setdefault(tuple(use.table_index for use in group.uses), []).append(group)
    tiles: list[_Tile] = []
    for key in sorted(by_adapters):
        same = by_adapters[key]
        tokens = np.array([token for group in same for token in group.tokens], np.int32)
        scales = np.array([[use.scale for use in group.uses] for group in same], np.float32)
        scales = scales.T.repeat([len(group.tokens) for group in same], axis=1)
        start = 0
        while start < len(tokens):
            if not tiles or tiles[-1].num_tokens == tile_tokens:
                tiles.append(_Tile())
            end = start + tile_tokens - tiles[-1].num_tokens
            tiles[-1].add(tokens[start:end], same[0].uses, scales[:, start:end])
            start = end
    return tiles


def _pack_tiles(tiles: Sequence[_Tile], shape: RowsShape) -> np.ndarray:
    entries = [list(tile.entries(shape.entry_tokens)) for tile in tiles]
    num_entries = sum(len(of_tile) for of_tile in entries)
    assert len(tiles) <= shape.num_tiles, len(tiles)
    assert num_entries <= shape.num_entries, num_entries
    words = np.zeros(shape.words_used(num_entries), np.int32)
    counts, tiles_B5, tokens_BM, adapters, ranks, layers_L2M, entries_EW = _split(words, shape)
    counts[0] = num_entries
    tokens_BM[:] = NOTHING
    layers_L2M[:, 0] = NOTHING
    entries_EW[:, _ENTRY_HEAD:] = NOTHING
    scales_LM = layers_L2M[:, 1].view(np.float32)
    layer = member = entry = 0
    for number, tile in enumerate(tiles):
        place_of = {table_index: place for place, table_index in enumerate(tile.members)}
        end = member + len(tile.members)
        tiles_B5[number] = layer, layer + tile.num_layers, member, end, -(-max(tile.members.values()) // 16)
        adapters[member:end] = list(tile.members)
        ranks[member:end] = list(tile.members.values())
        for run in tile.runs:
            places = slice(run.start, run.start + len(run.tokens))
            tokens_BM[number, places] = run.tokens
            scales_LM[layer : layer + len(run.uses), places] = run.scales
            for depth, use in enumerate(run.uses):
                layers_L2M[layer + depth, 0, places] = place_of[use.table_index]
        for use, depth, start, tokens in entries[number]:
            entries_EW[entry, :_ENTRY_HEAD] = use.table_index, use.rank, layer + depth, start
            entries_EW[entry, _ENTRY_HEAD : _ENTRY_HEAD + len(tokens)] = tokens
            entry += 1
        layer, member = layer + tile.num_layers, end
    return words


def _split(words, shape: RowsShape) -> list:
    """The parts of a buffer, an array or a tensor, in the order in which LoraRows names them."""
    sizes = (
        _ENTRY_HEAD,
        _TILE_HEAD * shape.num_tiles,
        shape.num_tiles * shape.tile_tokens,
        shape.num_members,
        shape.num_members,
        2 * shape.num_layers * shape.tile_tokens,
    )
    parts, start = [], 0
    for size in sizes:
        parts.append(words[start : start + size])
        start += size
    counts, tiles, tokens, adapters, ranks, layers = parts
    return [
        counts,
        tiles.reshape(shape.num_tiles, _TILE_HEAD),
        tokens.reshape(shape.num_tiles, shape.tile_tokens),
        adapters,
        ranks,
        layers.reshape(shape.num_layers, 2, shape.tile_tokens),
        words[start:].reshape(-1, shape.entry_words),
    ]
