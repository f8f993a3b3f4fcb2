"""Brings an adapter's file onto a GPU while steps go on: large copies, then one launch for each.

The file goes piece by piece through pinned memory and one block of device memory, on a stream of
its own; a kernel takes every matrix of a piece to its place in the tables. Nothing waits but the
thread that uploads: when it returns the numbers are there, so no step's stream waits for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from kiln_nn.kernels.place_matrices import Placement, PlacementTable, place_matrices_
from kiln_nn.lora import ADAPTER_DTYPES, AdapterLayout, Matrix, in_file_order

# Module path -> where its A [rank, in] and its B [out, rank] go, one for each slot.
MatrixPlaces = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

_PIECE_BYTES = 16 << 20
_NUM_PINNED = 3
# Copies of one thread are slower than the bus.
_NUM_COPIERS = max(1, min(8, (os.cpu_count() or 1) // 2))
_LEAST_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class _Piece:
    """Placements `first` to `end`, whose bytes are `start` to `stop` of the file's data."""

    first: int
    end: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Plan:
    table: PlacementTable
    pieces: tuple[_Piece, ...]


def upload_block_bytes(largest_matrix_bytes: int) -> int:
    """Device memory that an uploader takes beside the tables."""
    return max(_PIECE_BYTES, largest_matrix_bytes)


class AdapterUploader:
    """Uploads one adapter at a time into tables on a CUDA device.

    `places_of` says where an adapter of a rank goes; `largest_matrix_bytes` bounds one matrix of any.
    """

    def __init__(
        self, places_of: Callable[[int], MatrixPlaces], largest_matrix_bytes: int, device: torch.device
    ) -> None:
        self._places_of = places_of
        self._device = device
        self._piece_bytes = upload_block_bytes(largest_matrix_bytes)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device)
        self._block_u8 = torch.empty(self._piece_bytes, dtype=torch.uint8, device=device)
        self._has_non_finite = torch.zeros(1, dtype=torch.int32, device=device)
        self._pinned_u8 = [
            torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_PINNED)
        ]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_PINNED)]
        self._copiers = ThreadPoolExecutor(_NUM_COPIERS, thread_name_prefix="adapter-copy")
        # Every version of an adapter has the same layout.
        self._plan_of = lru_cache(maxsize=8)(self._make_plan)
        self._compile()
        # The tables are zeroed on the caller's stream.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def num_bytes(self) -> int:
        """Device memory held beside the tables."""
        return self._block_u8.nbytes

    def upload(self, index: int, layout: AdapterLayout, file_u8: torch.Tensor) -> bool:
        """Write the adapter into place `index` of the tables; False when a number is not finite.

        The layout has one number format. Returns when the device has the numbers.
        """
        data_u8 = file_u8[layout.data_start :]
        dtype = layout.dtype
        assert dtype is not None
        with self._lock, torch.cuda.stream(self._stream):
            plan = self._plan_of(layout)
            self._has_non_finite.zero_()
            for number, piece in enumerate(plan.pieces):
                self._send(data_u8[piece.start : piece.stop], number % _NUM_PINNED)
                place_matrices_(
                    plan.table,
                    piece.first,
                    piece.end,
                    self._block_u8.view(dtype),
                    piece.start // dtype.itemsize,
                    index,
                    self._has_non_finite,
                )
            return not bool(self._has_non_finite.item())  # waits for this stream alone

    def _send(self, bytes_u8: torch.Tensor, number: int) -> None:
        """Queue the copy of a piece to the block, over pinned memory that may still be on its way."""
        pinned_u8, copied = self._pinned_u8[number][: len(bytes_u8)], self._copied[number]
        copied.synchronize()
        step = max(_LEAST_COPY_BYTES, -(-len(bytes_u8) // _NUM_COPIERS))
        starts = range(0, len(bytes_u8), step)
        copies = [self._copiers.submit(pinned_u8[s : s + step].copy_, bytes_u8[s : s + step]) for s in starts]
        for copy in copies:
            copy.result()
        self._block_u8[: len(bytes_u8)].copy_(pinned_u8, non_blocking=True)
        copied.record()

    def _compile(self) -> None:
        """Launch once for each number format of files, before the first version comes."""
        (_, target), *_ = self._places_of(1).values()
        table = PlacementTable([Placement(None, target)], self._device)
        for dtype in ADAPTER_DTYPES:
            place_matrices_(table, 0, 1, self._block_u8.view(dtype), 0, 0, self._has_non_finite)

    def _make_plan(self, layout: AdapterLayout) -> _Plan:
        places = self._places_of(layout.spec.rank)
        targets = {}
        # Those of the multi-token-prediction layer have no place where it makes no drafts.
        pairs = {path: pair for path, pair in layout.pairs.items() if path in places}
        for path, pair in pairs.items():
            for matrix, target in zip(pair, places[path], strict=True):
                targets[matrix.name] = target
        matrices = in_file_order(pairs.values())
        placements = [
            Placement(matrix.start // matrix.dtype.itemsize, targets[matrix.name]) for matrix in matrices
        ]
        pieces = list(_pieces(matrices, self._piece_bytes))
        absent = [pair for path, pair in places.items() if path not in pairs]
        if absent:
            first = len(placements)
            placements += [Placement(None, target) for pair in absent for target in pair]
            pieces.append(_Piece(first, len(placements), 0, 0))
        return _Plan(PlacementTable(placements, self._device), tuple(pieces))


def _pieces(matrices: list[Matrix], most_bytes: int) -> list[_Piece]:
    """Runs of matrices in the file's order, of at most so many bytes with what lies between them."""
    pieces: list[_Piece] = []
    first, start = 0, matrices[0].start
    stop = start
    for number, matrix in enumerate(matrices):
        if matrix.start + matrix.nbytes - start > most_bytes:
            pieces.append(_Piece(first, number, start, stop))
            first, start = number, matrix.start
        stop = matrix.start + matrix.nbytes
    pieces.append(_Piece(first, len(matrices), start, stop))
    return pieces
