"""Linear layers of few tokens on Hopper: the ring of weights fills before the predecessor ends.

The tiles of triton.py, written in Gluon for what Triton's language cannot say. A program asks the
tensor memory accelerator for the first weights of its ring, then waits for its predecessor, then
asks for x. Programs are small enough to lie beside those of the kernel before, and their number
fits the multiprocessors, so that the memory does not idle between two kernels. Products run on
warp-group tensor cores, weights left; a tile of 24, 40, 48, 80 or 96 outputs is fetched as two
boxes and leaves some rows of the product unused; so are tokens that do not fill their tile.

Takes bf16 x and weights with 16-byte aligned rows on compute capability 9.0; outputs any number,
inputs a multiple of 8. Sums are float32 and rounded once. Every element is summed in one order,
given by the configuration alone.

Measured against float64 on an H200, 1 to 128 tokens: 1.7e-3 relative in bf16, one rounding; 5e-7
to 5e-6 in float32, growing with the inputs of a split. 4.0 to 4.4 TB/s at one token, 3.5 to 4.2 at
16, 2.9 to 4.0 at 64, where x comes from the L2 cache as often as there are tiles of outputs.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.config import LinearConfig
from kiln_nn.kernels.linear.triton_hopper_parts import (
    X_COLUMNS,
    ask_for_weights,
    ask_for_x,
    barrier,
    boxes,
    can_be_fetched,
    describe,
    rows_fetched,
    store,
    store_gated,
)


@gluon.jit
def _multiply(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    w_ring,
    x_ring,
    bars,
    row,
    token,
    num_outputs,
    begin,
    count,
    split_blocks,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    X_REST: gl.constexpr,
    HALVES: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    FOLDED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`[ROWS, TOKENS]` sums over `count` blocks of inputs, while the ring fills behind them."""
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    acc = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    total = acc
    for block in range(count):
        ready = block % STAGES
        mbarrier.wait(bars.index(ready), (block // STAGES) & 1)
        if FOLDED:  # noqa: SIM102 (known when compiling)
            if block > 0 and block % split_blocks == 0:
                # One partial sum is complete; they are added in the order in which the norm does.
                total = total + acc
                acc = gl.zeros([ROWS, TOKENS], gl.float32, layout)
        for sub in gl.static_range(SUBS):
            w = w_ring.index(ready * SUBS + sub)
            x = x_ring.index(ready * SUBS + sub).permute((1, 0))
            acc = warpgroup_mma(w, x, acc, is_async=True)
        # Folded sums may not be in flight where the branch above moves them.
        acc = warpgroup_mma_wait(0 if FOLDED else SUBS, deps=[acc])
        # The block before is done with its slot, in all warps after the barrier.
        barrier()
        later = block - 1 + STAGES
        slot = later % STAGES
        bar = bars.index(slot)
        wanted = (block > 0) & (later < count)
        where = begin + later
        ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            bar,
            slot,
            row,
            num_outputs,
            where,
            wanted,
            SLOT_BYTES,
            REST,
            HALVES,
            SUBS,
        )
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, where, wanted, X_REST, SUBS)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if FOLDED:
        acc = total + acc
    return acc


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "split_blocks", "shows_producers"])
def _linear_kernel(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    out_ptr,
    num_tokens,
    num_outputs,
    out_stride,
    num_blocks,
    split_blocks,
    shows_producers,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    X_BOX: gl.constexpr,
    X_REST: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    FOLDED: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    HALVES: gl.constexpr = 2 if GATED else 1
    OUTPUTS: gl.constexpr = BOX + REST
    SLOT_BYTES: gl.constexpr = (HALVES * OUTPUTS + X_BOX + X_REST) * SUBS * 128
    token = gl.program_id(0) * TOKENS
    split = gl.program_id(1)
    row = gl.program_id(2) * OUTPUTS
    w_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * SUBS, ROWS, X_COLUMNS], box_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * SUBS, TOKENS, X_COLUMNS], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)
    fence_async_shared()
    begin = split * split_blocks
    count = num_blocks if FOLDED else gl.minimum(split_blocks, num_blocks - begin)
    if DEPENDENT:  # noqa: SIM102 (known when compiling)
        if shows_producers == 0:
            gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        bar = bars.index(slot)
        where = begin + slot
        wanted = slot < count
        ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            bar,
            slot,
            row,
            num_outputs,
            where,
            wanted,
            SLOT_BYTES,
            REST,
            HALVES,
            SUBS,
        )
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        bar = bars.index(slot)
        where = begin + slot
        wanted = slot < count
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, where, wanted, X_REST, SUBS)
    acc = _multiply(
        box_desc,
        rest_desc,
        x_desc,
        x_rest_desc,
        w_ring,
        x_ring,
        bars,
        row,
        token,
        num_outputs,
        begin,
        count,
        split_blocks,
        SLOT_BYTES,
        REST,
        X_REST,
        HALVES,
        SUBS,
        STAGES,
        FOLDED,
        num_warps,
    )
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(slot))
    if GATED:
        store_gated(out_ptr, acc, row, token, num_tokens, num_outputs, out_stride, BOX, REST, num_warps)
    else:
        store(out_ptr, acc, row, token, split, OUTPUTS, num_tokens, num_outputs, out_stride, num_warps)


def takes(x_TI: torch.Tensor, w_OI: torch.Tensor) -> bool:
    """Whether the accelerator can fetch these tensors, beyond what triton.py asks of them."""
    return can_be_fetched(x_TI) and can_be_fetched(w_OI)


def constants(config: LinearConfig, num_tokens: int, *, is_gated: bool, is_folded: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    box, rest = boxes(config.outputs)
    x_box, x_rest = boxes(rows_fetched(num_tokens, config.tokens))
    rows = config.outputs * (2 if is_gated else 1)
    return {
        "BOX": box,
        "REST": rest,
        "X_BOX": x_box,
        "X_REST": x_rest,
        "ROWS": max(64, triton.next_power_of_2(rows)),
        "TOKENS": config.tokens,
        "SUBS": config.inputs // 64,
        "STAGES": config.stages,
        "GATED": is_gated,
        "FOLDED": is_folded,
        "num_warps": config.warps,
    }


def launch(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    out: torch.Tensor,
    config: LinearConfig,
    *,
    is_gated: bool = False,
    is_folded: bool = False,
    is_dependent: bool = True,
    shows_producers: bool = False,
) -> None:
    """Fill `out`: `[T, O]`, `[T, F]` in the gated form, or `[S, T, O]` where sums are not folded.

    The rows of `out` may lie apart, where it has two dimensions.
    With `shows_producers` the next kernel starts only after this one's producers have ended, so that
    it may read what they wrote before it waits.
    """
    num_tokens, num_inputs = x_TI.shape
    num_outputs = w_OI.shape[0] // (2 if is_gated else 1)
    num_blocks = triton.cdiv(num_inputs, config.inputs)
    is_folded = is_folded and config.splits > 1
    fixed = constants(config, num_tokens, is_gated=is_gated, is_folded=is_folded)
    options: dict[str, Any] = {"launch_pdl": True} if is_dependent else {}
    grid = (
        triton.cdiv(num_tokens, config.tokens),
        1 if is_gated or is_folded else config.splits,
        triton.cdiv(num_outputs, config.outputs),
    )
    _linear_kernel[grid](
        describe(w_OI, fixed["BOX"]),
        describe(w_OI, fixed["REST"] or fixed["BOX"]),
        describe(x_TI, fixed["X_BOX"]),
        describe(x_TI, fixed["X_REST"] or fixed["X_BOX"]),
        out,
        num_tokens,
        num_outputs,
        out.stride(-2),
        num_blocks,
        triton.cdiv(num_blocks, 1 if is_gated else config.splits),
        int(shows_producers),  # no constant: steps with and without adapters run what is compiled once
        **fixed,
        DEPENDENT=is_dependent,
        **options,
    )
