"""What the products of a few tokens multiply, by warp: fetched, left in shared memory, read by its threads.

Nothing changes hands but x and scales, which a program copies together: what a thread has asked for of the
weights it reads itself. Tensors give each thread one element or one row, so that a thread's registers are a
tuple of them; layouts say where each lies (triton_hopper_fragments.py).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kiln_nn.kernels.linear.triton_hopper_fragments import codes, fetch_words

_FETCH_WORDS, _FETCH_WORDS_OPERANDS = codes(fetch_words(is_masked=masked) for masked in (False, True))


@gluon.jit
def fetch_weights(
    values_ptr,
    rows,
    first_word,
    step: gl.constexpr,
    is_group,
    value_stride,
    num_outputs,
    slots,
    FOUR_BITS: gl.constexpr,
    WHOLE: gl.constexpr,
    STRIPES: gl.constexpr,
    GATED: gl.constexpr,
    STAGED: gl.constexpr,
):
    """Words of a warp's group `step` for all stripes of 16 rows: of each, rows `g`, then rows `g + 8`.

    `rows` are each thread's own first one, `first_word` where its words of the first group begin. Staged
    words go to `slots`, by row and piece.
    """
    LINE: gl.constexpr = 16 if FOUR_BITS else 32
    words: gl.tuple = ()
    for part in gl.static_range(STRIPES * 2):
        # Of a gated stripe eight rows are gates, and eight their ups.
        inner = part // 2 * 8 if GATED else part * 8
        down = (inner + part % 2 * num_outputs if GATED else inner + 0 * num_outputs).to(gl.int64)
        is_there = is_group & (rows + inner < num_outputs)
        places = first_word + down * value_stride + step * LINE
        for piece in gl.static_range(LINE // 16):
            if STAGED:
                slot = slots[part * (LINE // 16) + piece]
                _copy_words(values_ptr, places + 16 * piece, is_there, slot, WHOLE)
            else:
                at = values_ptr.to(gl.int64) + 4 * (places + 16 * piece)
                words += gl.inline_asm_elementwise(
                    _FETCH_WORDS[not WHOLE],
                    _FETCH_WORDS_OPERANDS[not WHOLE],
                    (at,) if WHOLE else (at, is_there.to(gl.int32)),
                    dtype=(gl.int32,) * 4,
                    is_pure=False,
                    pack=1,
                )
    if STAGED:
        async_copy.commit_group()
    return words


@gluon.jit
def _copy_words(values_ptr, places, is_there, slot, WHOLE: gl.constexpr):
    """Four words of each thread from `places` on to its own part of a slot, `[threads, 4]`."""
    WARPS: gl.constexpr = slot.shape[0] // 32
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    along: gl.constexpr = gl.SliceLayout(1, layout)
    places = gl.convert_layout(places, along, assert_trivial=True)
    words = gl.arange(0, 4, gl.SliceLayout(0, layout))
    ptrs = values_ptr + gl.max_contiguous(gl.multiple_of(places[:, None] + words[None, :], [1, 4]), [1, 4])
    if WHOLE:
        async_copy.async_copy_global_to_shared(slot, ptrs)
    else:
        is_there = gl.convert_layout(is_there, along, assert_trivial=True)
        async_copy.async_copy_global_to_shared(slot, ptrs, mask=is_there[:, None])


@gluon.jit
def read_words(slots, COUNT: gl.constexpr, num_warps: gl.constexpr):
    """What `_copy_words` has left there, four words of each of `COUNT` slots."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    quads: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [1, 0])
    words: gl.tuple = ()
    for place in gl.static_range(COUNT):
        quad = slots[place].load(quads).reshape([32 * num_warps, 2, 2])
        four = _halve(_halve((quad,), 1), 2)
        for word in gl.static_range(4):
            words += (gl.convert_layout(four[word], layout, assert_trivial=True),)
    return words


@gluon.jit
def group_scales(
    scales_ptr,
    row,
    group,
    last,
    scale_stride,
    num_outputs,
    step: gl.constexpr,
    STEPS: gl.constexpr,
    ROWS: gl.constexpr,
    GATED: gl.constexpr,
    WHOLE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Of each warp's group `step` the scales of a program's rows, `[warps, ROWS]`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [num_warps, 1], [1, 0])
    lanes = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    groups = group + step + gl.arange(0, num_warps, gl.SliceLayout(1, layout)) * STEPS
    outputs = row + (lanes // 16 * 8 + lanes % 8 if GATED else lanes)
    rows = outputs + lanes // 8 % 2 * num_outputs if GATED else outputs
    starts = rows.to(gl.int64) * scale_stride
    ptrs = scales_ptr + starts[None, :] + groups[:, None]
    if WHOLE:
        return gl.load(ptrs)
    is_there = (groups < last)[:, None] & (outputs < num_outputs)[None, :]
    return gl.load(ptrs, mask=is_there, other=0.0)


@gluon.jit
def read_scales(scales, COUNT: gl.constexpr, SCALING: gl.constexpr, num_warps: gl.constexpr):
    """Those of a thread's own rows, of which `COUNT` lie eight apart."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    shared_by: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [num_warps, 1, 1], [2, 1, 0])
    across: gl.constexpr = gl.SliceLayout(2, shared_by)
    own = gl.permute(scales.load(SCALING).reshape([num_warps, COUNT, 8]), (0, 2, 1))
    if COUNT == 2:
        parts = _halve((own,), 1)
    elif COUNT == 4:
        parts = _halve(_halve((own.reshape([num_warps, 8, 2, 2]),), 1), 2)
    else:
        parts = _halve(_halve(_halve((own.reshape([num_warps, 8, 2, 2, 2]),), 1), 2), 4)
    everywhere = gl.zeros([num_warps, 8, 4], gl.float32, shared_by)
    found: gl.tuple = ()
    for part in gl.static_range(COUNT):
        one = gl.expand_dims(gl.convert_layout(parts[part], across, assert_trivial=True), 2)
        one, _ = gl.broadcast(one, everywhere)
        found += (gl.convert_layout(one.reshape([32 * num_warps]), layout, assert_trivial=True),)
    return found


@gluon.jit
def copy_x(
    x_ptr,
    x,
    token,
    group,
    last,
    num_tokens,
    x_stride,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    COPYING: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    WHOLE: gl.constexpr,
    STAGED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """All x of a program into shared memory: by tile and step, `[rows, 32]` words as `x_layouts` has them."""
    ROWS: gl.constexpr = x[0].shape[0] // num_warps
    TOKENS: gl.constexpr = ROWS // 2
    lines = gl.arange(0, num_warps * ROWS, gl.SliceLayout(1, COPYING))
    columns = gl.arange(0, 32, gl.SliceLayout(0, COPYING))
    inner = lines % ROWS // 2 if FOUR_BITS else lines % TOKENS
    half = lines % 2 if FOUR_BITS else lines % ROWS // TOKENS
    words = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    groups = group + lines // ROWS * STEPS
    loaded: gl.tuple = ()
    for place in gl.static_range(TILES * STEPS):
        tokens = token + place // STEPS * TOKENS + inner
        groups_here = groups + place % STEPS
        starts = tokens.to(gl.int64) * (x_stride // 2) + groups_here * 64 + half * 32
        ptrs = words + starts[:, None] + columns[None, :]
        if WHOLE and TOKENS == 1:
            if STAGED:
                loaded += (gl.load(ptrs),)
            else:
                async_copy.async_copy_global_to_shared(x[place], ptrs)
        else:
            is_there = ((tokens < num_tokens) & (groups_here < last))[:, None]
            if STAGED:
                loaded += (gl.load(ptrs, mask=is_there, other=0),)
            else:
                async_copy.async_copy_global_to_shared(x[place], ptrs, mask=is_there)
    # Copies are waited for in their order, and those of staged weights were asked for before.
    if STAGED:
        for place in gl.static_range(TILES * STEPS):
            x[place].store(loaded[place])
    else:
        async_copy.commit_group()


@gluon.jit
def _halve(tensors, COUNT: gl.constexpr):
    """`COUNT` tensors by their last index, first those of 0."""
    lower: gl.tuple = ()
    upper: gl.tuple = ()
    for place in gl.static_range(COUNT):
        low, high = gl.split(tensors[place])
        lower += (low,)
        upper += (high,)
    return lower + upper


@gluon.jit
def x_registers(tile, READING: gl.constexpr, FOUR_BITS: gl.constexpr, num_warps: gl.constexpr):
    """What each thread wants of x of its warp's group, 16 registers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    shared_by: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [num_warps, 1, 1], [2, 1, 0])
    across: gl.constexpr = gl.SliceLayout(1, shared_by)
    TOKENS: gl.constexpr = tile.shape[0] // num_warps // 2
    words = tile.load(READING)
    if FOUR_BITS:
        # Half and pair of pairs are the thread's, place in a word and pair the register's.
        words = words.reshape([num_warps, TOKENS, 2, 8, 2, 2])
        words = gl.permute(words, (0, 1, 2, 4, 3, 5)).reshape([num_warps * TOKENS * 4, 2, 2, 2, 2])
    else:
        words = words.reshape([num_warps, 2, TOKENS, 4, 8])
        words = gl.permute(words, (0, 2, 3, 1, 4)).reshape([num_warps * TOKENS * 4, 2, 2, 2, 2])
    x = _halve(_halve(_halve(_halve((words,), 1), 2), 4), 8)
    registers: gl.tuple = ()
    for place in gl.static_range(16):
        register = x[place]
        if TOKENS == 1:  # which all threads of a row read
            register = gl.convert_layout(register.reshape([num_warps, 4]), across, assert_trivial=True)
            register = gl.expand_dims(register, 1) + gl.zeros([num_warps, 8, 4], gl.int32, shared_by)
            register = register.reshape([32 * num_warps])
        registers += (gl.convert_layout(register, layout, assert_trivial=True),)
    return registers
