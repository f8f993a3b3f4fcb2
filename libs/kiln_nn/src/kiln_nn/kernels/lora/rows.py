"""Which tokens of a step use which adapters, in the form the kernels walk over.

Tokens with the same adapters share a *tile* of up to `M` tokens; each adapter of a tile is an
*entry*. A token stands in one tile, so whoever computes a tile owns its outputs, and several
adapters of one token add up in a fixed order. All numbers lie in one buffer, so that one copy
brings them to the device, and what is not in use says so, so that a captured graph serves any step.

Legend: `B` tiles, `M` tokens of a tile, `E` entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

NO_TOKEN = -1
DECODE_TILE_TOKENS = 16
PREFILL_TILE_TOKENS = 64


@dataclass(frozen=True)
class AdapterUse:
    """One adapter of a token: its place in the tables, its rank and the factor on `B A x`.

    Where tokens with different adapters share a tile, these are added in the order of `key`, then
    of their places; each group's own uses should stand in that order.
    """

    table_index: int
    rank: int
    scale: float
    key: str = ""


@dataclass(frozen=True)
class TokenGroup:
    """Tokens that use the same adapters with the same scales; no adapter twice."""

    tokens: Sequence[int]
    uses: tuple[AdapterUse, ...]


@dataclass(frozen=True)
class RowsShape:
    """How many tiles and entries a buffer has room for."""

    tile_tokens: int
    num_tiles: int
    num_entries: int

    @classmethod
    def for_any(cls, num_tokens: int, num_adapters: int, tile_tokens: int = DECODE_TILE_TOKENS) -> RowsShape:
        """Room for any mixture of `num_adapters` adapters over so many tokens."""
        num_full = -(-num_tokens // tile_tokens)
        num_tiles = min(num_tokens, num_full + num_adapters)
        return cls(tile_tokens, num_tiles, max(num_tiles, num_full * num_adapters))

    @property
    def num_words(self) -> int:
        """Size of the buffer in 4-byte words."""
        return self.words_used(self.num_entries)

    def words_used(self, num_entries: int) -> int:
        """How far the buffer is written for so many entries; what is theirs alone comes last."""
        return (
            (4 + self.tile_tokens) * self.num_tiles
            + 2 * self.num_entries
            + 2 * self.tile_tokens * num_entries
        )


@dataclass(frozen=True)
class LoraRows:
    """Views into one int32 buffer on the device.

    `tiles_B4`: a tile's first entry, the one behind its last, and of the first entry adapter and
    rank, which saves the kernel a step on its way to B. A tile that is not in use has no entries.
    `tokens_BM`: places in x and y, NO_TOKEN behind the last one of a tile.
    `adapters_E`, `ranks_E`: an entry's place in the tables, and its rank; 0 for one not in use.
    `entries_E2M`: the tokens of the entry's tile once more, and the float32 bits of each one's
    factor, 0 for a token that does not use the adapter; nonsense behind the last entry.
    """

    shape: RowsShape
    tiles_B4: torch.Tensor
    tokens_BM: torch.Tensor
    adapters_E: torch.Tensor
    ranks_E: torch.Tensor
    entries_E2M: torch.Tensor

    @classmethod
    def over(cls, buffer: torch.Tensor, shape: RowsShape) -> LoraRows:
        """Views into a buffer of `shape.num_words` int32 words."""
        tiles_B4, tokens_BM, adapters_E, ranks_E, entries_E2M = _split(buffer, shape)
        return cls(shape, tiles_B4, tokens_BM, adapters_E, ranks_E, entries_E2M)

    @classmethod
    def of(
        cls, groups: Sequence[TokenGroup], tile_tokens: int, device: torch.device | str = "cpu"
    ) -> LoraRows:
        """Rows of exactly these groups, copied to the device."""
        words, shape = pack_exactly(groups, tile_tokens)
        return cls.over(torch.from_numpy(words).to(device), shape)

    @property
    def scales_EM(self) -> torch.Tensor:
        return self.entries_E2M[:, 1].view(torch.float32)


def pack_exactly(groups: Sequence[TokenGroup], tile_tokens: int) -> tuple[np.ndarray, RowsShape]:
    """The words of a buffer for exactly these groups."""
    tiles = _make_tiles(groups, tile_tokens)
    shape = RowsShape(tile_tokens, len(tiles), _num_entries(tiles))
    return _pack_tiles(tiles, shape), shape


def pack_groups(groups: Sequence[TokenGroup], shape: RowsShape) -> np.ndarray:
    """The words of a buffer of the given shape, as far as it is used.

    A shape `for_any` step has room for every mixture: where tiles of tokens with the same adapters
    are too many, tokens with different adapters share them.
    """
    tiles = _make_tiles(groups, shape.tile_tokens)
    if len(tiles) > shape.num_tiles or _num_entries(tiles) > shape.num_entries:
        tiles = _make_few_tiles(groups, shape.tile_tokens)
    return _pack_tiles(tiles, shape)


@dataclass(frozen=True)
class _Tile:
    """Up to M tokens; `scales_EM` are their factors for each of the adapters."""

    tokens: np.ndarray
    uses: tuple[AdapterUse, ...]
    scales_EM: np.ndarray


def _make_tiles(groups: Sequence[TokenGroup], tile_tokens: int) -> list[_Tile]:
    """Tiles of tokens that have exactly the same adapters, though each with its own scales."""
    by_adapters: dict[tuple[int, ...], list[TokenGroup]] = {}
    for group in groups:
        if group.uses and group.tokens:
            by_adapters.setdefault(tuple(use.table_index for use in group.uses), []).append(group)
    tiles: list[_Tile] = []
    for key in sorted(by_adapters):
        tiles += _cut(by_adapters[key], by_adapters[key][0].uses, tile_tokens)
    return tiles


def _make_few_tiles(groups: Sequence[TokenGroup], tile_tokens: int) -> list[_Tile]:
    """As few tiles as the tokens fill, whatever adapters meet in one."""
    using = sorted(
        (group for group in groups if group.uses and group.tokens),
        key=lambda group: [use.table_index for use in group.uses],
    )
    all_uses = {use.table_index: use for group in using for use in group.uses}
    in_order = sorted(all_uses.values(), key=lambda use: (use.key, use.table_index))
    tiles = _cut(using, tuple(in_order), tile_tokens)
    return [_without_unused(tile) for tile in tiles if tile.scales_EM.any()]


def _cut(groups: Sequence[TokenGroup], uses: tuple[AdapterUse, ...], tile_tokens: int) -> list[_Tile]:
    place = {use.table_index: number for number, use in enumerate(uses)}
    scales_EG = np.zeros((len(uses), len(groups)), np.float32)
    for number, group in enumerate(groups):
        for use in group.uses:
            scales_EG[place[use.table_index], number] = use.scale
    tokens = np.array([token for group in groups for token in group.tokens], np.int32)
    scales = np.repeat(scales_EG, [len(group.tokens) for group in groups], axis=1)
    return [
        _Tile(tokens[start : start + tile_tokens], uses, scales[:, start : start + tile_tokens])
        for start in range(0, len(tokens), tile_tokens)
    ]


def _without_unused(tile: _Tile) -> _Tile:
    used = [number for number in range(len(tile.uses)) if tile.scales_EM[number].any()]
    return _Tile(tile.tokens, tuple(tile.uses[number] for number in used), tile.scales_EM[used])


def _pack_tiles(tiles: Sequence[_Tile], shape: RowsShape) -> np.ndarray:
    num_entries = _num_entries(tiles)
    assert len(tiles) <= shape.num_tiles, len(tiles)
    assert num_entries <= shape.num_entries, num_entries
    words = np.zeros(shape.words_used(num_entries), np.int32)
    tiles_B4, tokens_BM, adapters, ranks, entries_E2M = _split(words, shape)
    tokens_BM[:] = NO_TOKEN
    entries_E2M[:, 0] = NO_TOKEN
    scales_EM = entries_E2M[:, 1].view(np.float32)
    first = 0
    for number, tile in enumerate(tiles):
        end, num_tokens = first + len(tile.uses), len(tile.tokens)
        tiles_B4[number] = first, end, tile.uses[0].table_index, tile.uses[0].rank
        tokens_BM[number, :num_tokens] = tile.tokens
        adapters[first:end] = [use.table_index for use in tile.uses]
        ranks[first:end] = [use.rank for use in tile.uses]
        entries_E2M[first:end, 0, :num_tokens] = tile.tokens
        scales_EM[first:end, :num_tokens] = tile.scales_EM
        first = end
    return words


def _num_entries(tiles: Sequence[_Tile]) -> int:
    return sum(len(tile.uses) for tile in tiles)


def _split(words, shape: RowsShape) -> list:
    """The parts of a buffer, an array or a tensor, in the order in which LoraRows names them."""
    sizes = (4 * shape.num_tiles, shape.num_tiles * shape.tile_tokens, shape.num_entries, shape.num_entries)
    parts, start = [], 0
    for size in sizes:
        parts.append(words[start : start + size])
        start += size
    tiles, tokens, adapters, ranks = parts
    return [
        tiles.reshape(shape.num_tiles, 4),
        tokens.reshape(shape.num_tiles, shape.tile_tokens),
        adapters,
        ranks,
        words[start:].reshape(-1, 2, shape.tile_tokens),
    ]
