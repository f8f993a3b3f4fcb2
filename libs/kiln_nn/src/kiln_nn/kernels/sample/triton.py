"""Drawing tokens in Triton: no sort of the vocabulary, one pass over the logits for most rows.

Four launches: a survey of all logits (`triton_survey`), the edits of single logits, a program per
row that draws (`triton_draw`), and a search (`triton_search`) for the rows that this could not
settle. All of them read their settings on the device and end at once where there is nothing to do,
so they can be captured in a CUDA graph and replayed for any settings. Sums are in a fixed order.

Takes float32 logits of up to 1,048,576 tokens whose last dimension is contiguous, and settings in
float64. Weights are float32, cumulative sums float64. A uniform number that lies within about 1e-6
of a border between two tokens may fall on either side of it. Measured on an H200 at 248,320 tokens:
log-probabilities within 2.3e-7 of float64.

Source: our own; DESIGN section 4. Legend: `R` rows, `V` vocabulary, `E` edits, `F` fields.
"""

from __future__ import annotations

import torch
import triton

from kiln_nn.kernels.dispatch import device_limits, is_interpreted
from kiln_nn.kernels.sample.triton_draw import FEW_CANDIDATES, MOST_CANDIDATES, NUM_NOTES, draw_kernel
from kiln_nn.kernels.sample.triton_search import NUM_BORDERS, search_kernel
from kiln_nn.kernels.sample.triton_survey import BLOCK, CHUNK, NUM_PLANES, edit_kernel, survey_kernel

_LARGEST_VOCABULARY = 2**20
_MOST_EDIT_PROGRAMS = 1024
_MOST_PROGRAMS_PER_ROW = 32
_LAUNCH = {"survey": 4, "edit": 4, "draw": 8, "search": 16}  # warps


def takes(logits_RV: torch.Tensor, rows_RF: torch.Tensor, edits_EF: torch.Tensor) -> bool:
    """Whether the kernels take these formats and strides."""
    return (
        logits_RV.dtype is torch.float32
        and logits_RV.stride(1) == 1
        and 0 < logits_RV.shape[1] <= _LARGEST_VOCABULARY
        and 0 < logits_RV.shape[0] < 65536
        and rows_RF.dtype is torch.float64
        and edits_EF.dtype is torch.float64
        and rows_RF.is_contiguous()
        and edits_EF.is_contiguous()
    )


def draw_tokens(
    logits_RV: torch.Tensor,
    rows_RF: torch.Tensor,
    edits_EF: torch.Tensor,
    tokens_R: torch.Tensor,
    drawn_RF: torch.Tensor,
    *,
    is_batch_invariant: bool = False,
) -> None:
    """As the reference, for inputs that `takes` accepts. Edits pass through the logits and are undone."""
    num_rows, vocab_size = logits_RV.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    new = logits_RV.new_empty
    block_best = new(num_rows, num_chunks * (CHUNK // BLOCK))
    stats = new(num_rows, NUM_PLANES, num_chunks)
    notes = new(num_rows, NUM_NOTES, dtype=torch.float64)
    unedited = new(max(1, edits_EF.shape[0]))
    stride = logits_RV.stride(0)
    shape = {"VOCAB": vocab_size, "NUM_CHUNKS": num_chunks, "CHUNK": CHUNK}
    padded = {"CHUNKS": triton.next_power_of_2(num_chunks)}

    survey_kernel[(num_chunks, num_rows)](
        logits_RV, rows_RF, block_best, stats, stride, **shape, BLOCK=BLOCK, num_warps=_LAUNCH["survey"]
    )
    if edits_EF.shape[0]:
        edit_kernel[(min(edits_EF.shape[0], _MOST_EDIT_PROGRAMS),)](
            logits_RV,
            rows_RF,
            edits_EF,
            unedited,
            block_best,
            stats,
            num_rows,
            stride,
            **shape,
            BLOCK=BLOCK,
            num_warps=_LAUNCH["edit"],
        )
    # The programs that share a row in the search sum it in parts.
    num_programs = 1 if is_batch_invariant else _programs_per_row(num_rows, num_chunks, logits_RV.device)
    arrivals = new(num_rows, dtype=torch.int32)
    draw_kernel[(num_rows,)](
        logits_RV,
        rows_RF,
        edits_EF,
        unedited,
        block_best,
        stats,
        new(num_rows, MOST_CANDIDATES, dtype=torch.int32),
        new(num_rows, MOST_CANDIDATES),
        new(num_rows, MOST_CANDIDATES, dtype=torch.int32),
        notes,
        arrivals,
        tokens_R,
        drawn_RF,
        stride,
        **shape,
        **padded,
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(num_chunks * (CHUNK // BLOCK)),
        FEW_CANDIDATES=FEW_CANDIDATES,
        MOST_CANDIDATES=MOST_CANDIDATES,
        num_warps=_LAUNCH["draw"],
    )
    search_kernel[(num_programs, num_rows)](
        logits_RV,
        rows_RF,
        edits_EF,
        unedited,
        stats,
        notes,
        new(num_rows, 2 * NUM_BORDERS * num_programs, dtype=torch.float64),
        new(num_rows, (MOST_CANDIDATES + 1) * num_programs, dtype=torch.int32),
        arrivals,
        tokens_R,
        drawn_RF,
        stride,
        **shape,
        **padded,
        PROGRAMS=num_programs,
        ROOM=MOST_CANDIDATES,
        num_warps=_LAUNCH["search"],
    )


def _programs_per_row(num_rows: int, num_chunks: int, device: torch.device) -> int:
    """How many programs share a row in the search: a power of two, so that all fit the GPU at once.

    They wait for each other, so they must run together: not on a GPU whose multiprocessors are
    parted between processes.
    """
    if is_interpreted():
        return 1
    fitting = device_limits(device).num_multiprocessors // num_rows
    most = min(fitting, num_chunks, _MOST_PROGRAMS_PER_ROW)
    return 1 << (most.bit_length() - 1) if most > 0 else 1
