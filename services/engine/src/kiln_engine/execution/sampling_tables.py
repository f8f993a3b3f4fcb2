"""What the rows of a step ask of the sampler, as the tables of numbers that the device reads.

Both tables lie in one buffer and travel in one copy. Legend: `R` rows, `E` edits, `F` fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kiln_engine.domain.plan import RowSampling
from kiln_engine.execution.draws import uniform_draws
from kiln_engine.execution.logit_edits import changes_logits, logit_edits
from kiln_engine.model import to_device
from kiln_nn.kernels.sample.settings import (
    END_EDIT,
    FIRST_EDIT,
    NUM_EDIT_FIELDS,
    NUM_ROW_FIELDS,
    PADDING,
    UNIFORM,
)

# Below this the division by the temperature would leave float32; the best token has all the mass anyway.
_LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplingTables:
    """The rows' settings and edits on the device; fields as in `kiln_nn.kernels.sample.settings`."""

    rows_RF: torch.Tensor
    edits_EF: torch.Tensor


def fill_tables(rows: Sequence[RowSampling], num_rows: int) -> np.ndarray:
    """Both tables, float64: `num_rows` rows, padded behind the given ones, and from `_edits_start` the edits."""
    numbers = np.zeros(_edits_start(num_rows))
    table_RF = numbers[: num_rows * NUM_ROW_FIELDS].reshape(num_rows, NUM_ROW_FIELDS)
    table_RF[len(rows) :] = PADDING
    if rows:
        table_RF[: len(rows)] = [row_fields(row) for row in rows]
        table_RF[: len(rows), UNIFORM] = uniform_draws(
            [row.params.seed for row in rows], [row.output_index for row in rows]
        )
    edits: list[tuple[float, ...]] = []
    for index, row in enumerate(rows):
        if changes_logits(row):
            table_RF[index, FIRST_EDIT] = len(edits)
            edits.extend((index, *edit) for edit in logit_edits(row))
            table_RF[index, END_EDIT] = len(edits)
    # The kernels find the number of edits in the last row.
    table_RF[-1, END_EDIT] = len(edits)
    if not (rows and num_rows == len(rows) and changes_logits(rows[-1])):
        table_RF[-1, FIRST_EDIT] = len(edits)
    if not edits:
        return numbers
    return np.concatenate([numbers, np.array(edits, dtype=np.float64).reshape(-1)])


def _edits_start(num_rows: int) -> int:
    """Where the edits begin: behind the rows, at a multiple of 16 bytes.

    Elsewhere each kernel would have a second form for odd numbers of rows, compiled when a server
    first meets one.
    """
    return (num_rows * NUM_ROW_FIELDS + 1) // 2 * 2


def row_fields(row: RowSampling) -> tuple[float, ...]:
    params = row.params
    inverse = 1.0 / max(params.temperature, _LOWEST_TEMPERATURE) if params.temperature > 0 else 0.0
    log_min_p = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    return (inverse, 0.0, params.top_k, params.top_p, log_min_p, 0.0, 0.0)


def exact_tables(rows: Sequence[RowSampling], device: torch.device) -> SamplingTables:
    """Tables of their own, no longer than the rows ask for."""
    both = to_device(torch.from_numpy(fill_tables(rows, len(rows))), device)
    return _split(both, len(rows))


def _split(both: torch.Tensor, num_rows: int) -> SamplingTables:
    rows_RF = both[: num_rows * NUM_ROW_FIELDS].view(num_rows, NUM_ROW_FIELDS)
    return SamplingTables(rows_RF, both[_edits_start(num_rows) :].view(-1, NUM_EDIT_FIELDS))


class StaticTables:
    """Tables at one place on the device, for graphs: each step's overwrite those of the step before.

    Steps and copies go into one stream, so a step's tables are there when it starts and stay until
    it is done. Tables for different numbers of rows share the place.
    """

    def __init__(self, max_rows: int, max_edits: int, device: torch.device) -> None:
        self._max_edits = max_edits
        num_numbers = _edits_start(max_rows) + max_edits * NUM_EDIT_FIELDS
        self._both = torch.zeros(num_numbers, dtype=torch.float64, device=device)

    def put(self, rows: Sequence[RowSampling], num_rows: int) -> SamplingTables:
        """Send the tables of these rows, padded to `num_rows`."""
        numbers = torch.from_numpy(fill_tables(rows, num_rows))
        end = _edits_start(num_rows) + self._max_edits * NUM_EDIT_FIELDS
        assert len(rows) <= num_rows
        assert len(numbers) <= end
        if self._both.is_cuda:
            # Kept by torch's allocator until the copy is done.
            numbers = numbers.pin_memory()
        self._both[: len(numbers)].copy_(numbers, non_blocking=True)
        return _split(self._both[:end], num_rows)
