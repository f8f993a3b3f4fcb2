"""The prefill in Triton against its float64 reference, with nonsense wherever nothing is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kiln_nn.kernels.delta_decode import DeltaMemory, delta_decode
from kiln_nn.kernels.delta_prefill import ChunkCapacity, ChunkSlots
from kiln_nn.kernels.delta_prefill.reference import delta_prefill_reference
from tests.support.delta_decode import (
    DeltaShape,
    Tokens,
    converted,
    empty_memory,
    exact,
    make_rows,
    memory_tensors,
    random_memory,
    random_weights,
    tokens_to,
    weights_to,
)
from tests.support.delta_prefill import make_chunks, part, random_prompt
from tests.support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    SHARED_MEMORY_LIMIT,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    relative_error,
    run_under_interpreter,
    starts_interpreter,
)

FORMATS = {  # state, everything else
    "float32": (torch.float32, torch.float32),
    "bf16 around float32": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
# float32: sums in another order. bf16: about a dozen operands and results round (rms 0.8e-3 to
# 1.7e-3 each, 5.1e-3 together in a state); the interpreter cuts off instead of rounding.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2 if INTERPRETED else 6e-3}
SMALL = DeltaShape()
RELEASED = DeltaShape(num_key_heads=1, num_heads=2, key_dim=128, value_dim=128)


def _kernel():
    from kiln_nn.kernels.delta_prefill import triton

    return triton


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def _compare(before: DeltaMemory, after: DeltaMemory, expected: DeltaMemory, tolerance: float) -> None:
    """Everything written is close to the reference's, everything else bit for bit what it was."""
    tensors = (memory_tensors(x) for x in (before, after, exact(before), expected))
    for was, now, reference_was, reference in zip(*tensors, strict=True):
        written = reference != reference_was
        is_same = (now == was) | (now.isnan() & was.isnan())
        # Unused entries of the rings written to become zero.
        is_cleared = (now == 0).cpu() & (reference == 0)
        assert (is_same.cpu() | is_cleared)[~written].all()
        if written.any():
            assert relative_error(now.cpu()[written], reference[written]) < tolerance


def _run(
    shape: DeltaShape, formats: str, *chunks: ChunkSlots, capacity=None, config=None, num_tokens=None, seed=0
) -> None:
    state_dtype, dtype = FORMATS[formats]
    draw = torch.Generator().manual_seed(seed)
    before = converted(random_memory(shape, {}, draw), state_dtype, dtype, DEVICE)
    weights = weights_to(random_weights(shape, draw), dtype, DEVICE)
    num_tokens = num_tokens or sum(chunk.num_tokens for chunk in chunks)
    tokens = tokens_to(random_prompt(shape, num_tokens, seed + 1), dtype, DEVICE)
    memory = converted(before, state_dtype, dtype, DEVICE)
    assert _kernel().supports(memory, weights, *tokens.all())
    on_device = make_chunks(*chunks, page_tokens=shape.page_tokens, capacity=capacity, device=DEVICE)
    out = _kernel().delta_prefill(memory, on_device, weights, *tokens.all(), config)
    expected_memory = exact(before)
    expected = delta_prefill_reference(
        expected_memory,
        make_chunks(*chunks, page_tokens=shape.page_tokens),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert out.dtype == dtype
    used = sum(chunk.num_tokens for chunk in chunks)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert not out[used:].any()
    _compare(before, memory, expected_memory, max(TOLERANCE[dtype], TOLERANCE[state_dtype]))


# Fresh and resumed, in place and elsewhere, ring and page boundary, checkpoints inside tiles.
CHUNKS = (
    ChunkSlots(70, -1, 0, ((16, 1), (64, 2))),
    ChunkSlots(64, 3, 3),
    ChunkSlots(9, 4, 5),
    ChunkSlots(7, -1, 6),
)


@on_triton
@pytest.mark.parametrize("formats", list(FORMATS))
def test_chunks_of_all_kinds(formats):
    _run(SMALL, formats, *CHUNKS)


@on_triton
# In the interpreter only as it is served: the formats are one code for all shapes.
@pytest.mark.parametrize("formats", ["bf16"] if INTERPRETED else list(FORMATS))
def test_the_released_head_shape(formats):
    _run(RELEASED, formats, ChunkSlots(200, 1, 2, ((48, 3), (128, 4))), ChunkSlots(5, -1, 0))


@on_triton
@pytest.mark.parametrize(
    "num_tokens", [1, 16, 63, 128] if INTERPRETED else [1, 3, 15, 16, 17, 63, 65, 127, 128, 130]
)
def test_lengths(num_tokens):
    _run(DeltaShape(num_key_heads=1, num_heads=2), "float32", ChunkSlots(num_tokens, 1, 2), seed=num_tokens)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="too many for the interpreter")
@pytest.mark.parametrize("formats", ["float32", "bf16"])
def test_every_length_to_130(formats):
    for num_tokens in range(1, 131):
        _run(RELEASED, formats, ChunkSlots(num_tokens, 1, 2, seed_checkpoint(num_tokens)), seed=num_tokens)


def seed_checkpoint(num_tokens: int) -> tuple[tuple[int, int], ...]:
    """One at a page boundary that differs from length to length, if there is one."""
    num_pages = num_tokens // 16
    return ((16 * (1 + num_tokens % num_pages), 3),) if num_pages else ()


@on_triton
@pytest.mark.parametrize(
    "shape",
    [
        DeltaShape(num_key_heads=1, num_heads=3, capacity=19),
        DeltaShape(num_key_heads=2, num_heads=2, key_dim=32, value_dim=16, conv_width=2),
        DeltaShape(num_key_heads=1, num_heads=1, key_dim=64, value_dim=64, capacity=8, page_tokens=8),
        DeltaShape(num_key_heads=1, num_heads=2, conv_width=3, capacity=40, page_tokens=32),
    ],
)
def test_other_shapes(shape):
    page = shape.page_tokens
    _run(shape, "float32", ChunkSlots(64 + page + 3, 1, 2, ((page, 3),)), ChunkSlots(5, -1, 4))


@on_triton
def test_what_the_configuration_cuts_differently():
    config = _kernel().CONFIGS[torch.float32, True]
    for changed in ({"pass_blocks": ((16, 4),)}, {"span": 1}):
        one = dataclasses.replace(config, **changed)
        _run(SMALL, "float32", ChunkSlots(140, 1, 2, ((32, 3),)), config=one)


@on_triton
def test_padding_and_a_chunk_that_keeps_nothing():
    chunks = (*CHUNKS, ChunkSlots(20, -1, -1))
    _run(SMALL, "float32", *chunks, capacity=ChunkCapacity.of(7, 200, 16), num_tokens=200)


@on_triton
@pytest.mark.parametrize("formats", ["float32"] if INTERPRETED else ["float32", "bf16"])
def test_a_split_prompt_and_its_answer_equal_the_whole(formats):
    state_dtype, dtype = FORMATS[formats]
    shape, draw = RELEASED, torch.Generator().manual_seed(5)
    splits, answer = ((0, 64), (64, 112), (112, 119)), 12
    if not INTERPRETED:
        splits, answer = ((0, 512), (512, 528), (528, 1003)), 45
    num_prompt = splits[-1][1]
    weights = weights_to(random_weights(shape, draw), dtype, DEVICE)
    tokens = tokens_to(random_prompt(shape, num_prompt + answer, 6), dtype, DEVICE)
    memory = converted(empty_memory(shape), state_dtype, dtype, DEVICE)
    outputs = []
    for start, end in splits:
        chunk = make_chunks(ChunkSlots(end - start, 0 if start else -1, 0), device=DEVICE)
        outputs.append(_kernel().delta_prefill(memory, chunk, weights, *part(tokens, start, end).all()))
    for t in range(num_prompt, num_prompt + answer):
        length = t % 16
        rows = make_rows((0, 0, length, 0 if length == 15 else None), device=DEVICE)
        outputs.append(delta_decode(memory, rows, weights, *part(tokens, t, t + 1).all()))
    expected = delta_prefill_reference(
        empty_memory(shape),
        make_chunks(ChunkSlots(num_prompt + answer)),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    for part_of, expected_part in zip(outputs, expected.split([len(x) for x in outputs]), strict=True):
        # A single token's error scatters about that of the whole.
        assert relative_error(part_of, expected_part) < TOLERANCE[dtype] * (2 if len(part_of) == 1 else 1)
    assert relative_error(torch.cat(outputs), expected) < TOLERANCE[dtype]


@on_triton
def test_strided_projections_and_narrow_slot_numbers():
    shape, draw = SMALL, torch.Generator().manual_seed(2)
    before = converted(random_memory(shape, {}, draw), torch.float32, torch.float32, DEVICE)
    memory, expected_memory = before, exact(before)
    weights = weights_to(random_weights(shape, draw), torch.float32, DEVICE)
    tokens = tokens_to(random_prompt(shape, 70, 3), torch.float32, DEVICE)
    # One projection's output, cut into the four.
    wide = torch.cat([x.flatten(1) for x in tokens.all()], 1).repeat(1, 2)
    widths = [x[0].numel() for x in tokens.all()]
    mixed, a, b, z = wide[:, : sum(widths)].split(widths, 1)
    parts = (mixed, a, b, z.view(70, shape.num_heads, shape.value_dim))
    chunks = make_chunks(ChunkSlots(70, 1, 2, ((48, 3),)), device=DEVICE)
    narrow = dataclasses.replace(
        chunks,
        **{f.name: getattr(chunks, f.name).int() for f in dataclasses.fields(chunks) if f.init},
    )
    assert _kernel().supports(memory, weights, *parts)
    out = _kernel().delta_prefill(memory, narrow, weights, *parts)
    expected = delta_prefill_reference(
        expected_memory,
        make_chunks(ChunkSlots(70, 1, 2, ((48, 3),))),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert relative_error(memory.state_SHKV[3], expected_memory.state_SHKV[3]) < TOLERANCE[torch.float32]


@on_triton
def test_repeated_keys_lose_no_digits():
    """All keys alike: entries of the inverse's powers would exceed 1e17."""
    shape, draw = SMALL, torch.Generator().manual_seed(3)
    weights = weights_to(random_weights(shape, draw), torch.float32, DEVICE)
    tokens = random_prompt(shape, 64, 4)
    tokens = Tokens(tokens.mixed_RC[:1].expand(64, -1), tokens.a_RH, tokens.b_RH + 6, tokens.z_RHV)
    tokens = tokens_to(Tokens(*(x.contiguous() for x in tokens.all())), torch.float32, DEVICE)
    memory = converted(empty_memory(shape), torch.float32, torch.float32, DEVICE)
    chunk = ChunkSlots(64, -1, 0)
    out = _kernel().delta_prefill(memory, make_chunks(chunk, device=DEVICE), weights, *tokens.all())
    expected = delta_prefill_reference(
        empty_memory(shape),
        make_chunks(chunk),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert relative_error(out, expected) < 1e-4


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs a graph")
def test_one_graph_serves_other_chunks():
    shape, draw = RELEASED, torch.Generator().manual_seed(6)
    state_dtype, dtype = FORMATS["bf16"]
    before = converted(random_memory(shape, {}, draw), state_dtype, dtype, DEVICE)
    memory, expected_memory = converted(before, state_dtype, dtype, DEVICE), exact(before)
    weights = weights_to(random_weights(shape, draw), dtype, DEVICE)
    tokens = tokens_to(random_prompt(shape, 256, 7), dtype, DEVICE)
    capacity = ChunkCapacity.of(4, 256, 16)
    static = make_chunks(capacity=capacity, device=DEVICE)
    _kernel().delta_prefill(memory, static, weights, *tokens.all())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _kernel().delta_prefill(memory, static, weights, *tokens.all())
    graph.replay()
    assert not out.any()
    _compare(before, memory, exact(before), 0.0)
    chunks = (ChunkSlots(130, 1, 2, ((80, 3),)), ChunkSlots(1, -1, 4), ChunkSlots(100, 5, 5))
    contents = make_chunks(*chunks, capacity=capacity, device=DEVICE)
    for field in dataclasses.fields(static):
        if field.init:
            getattr(static, field.name).copy_(getattr(contents, field.name))
    graph.replay()
    expected = delta_prefill_reference(
        expected_memory,
        make_chunks(*chunks),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert relative_error(out, expected) < TOLERANCE[dtype]
    _compare(before, memory, expected_memory, TOLERANCE[dtype])


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")
@pytest.mark.parametrize("formats", ["float32", "bf16"])
def test_long_and_packed_prompts(formats):
    shape = DeltaShape(num_key_heads=4, num_heads=8, key_dim=128, value_dim=128, num_slots=12)
    _run(shape, formats, ChunkSlots(5000, 1, 2, ((1024, 3), (2048, 4), (4992, 5))))
    packed = [ChunkSlots(17 * n + 40, -1, n) for n in range(12)]
    _run(shape, formats, *packed, capacity=ChunkCapacity.of(16, 2048, 16), num_tokens=2048, seed=1)


@on_triton
def test_the_comparison_sees_a_wiped_checkpoint():
    with pytest.raises(AssertionError):
        _wiped_run()


def _wiped_run() -> None:
    shape, draw = SMALL, torch.Generator().manual_seed(8)
    memory = converted(random_memory(shape, {}, draw), torch.float32, torch.float32, DEVICE)
    expected_memory = exact(memory)
    weights = weights_to(random_weights(shape, draw), torch.float32, DEVICE)
    tokens = tokens_to(random_prompt(shape, 20, 9), torch.float32, DEVICE)
    memory.state_SHKV[1] = 0
    chunk = ChunkSlots(20, 1, 2)
    out = _kernel().delta_prefill(memory, make_chunks(chunk, device=DEVICE), weights, *tokens.all())
    expected = delta_prefill_reference(
        expected_memory,
        make_chunks(chunk),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert relative_error(out, expected) < 0.05


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("formats", ["float32", "bf16"])
def test_it_compiles_for_every_supported_gpu(formats):
    state_dtype, dtype = FORMATS[formats]
    shape = DeltaShape(num_key_heads=16, num_heads=32, key_dim=128, value_dim=128, num_slots=1)
    draw = torch.Generator().manual_seed(7)
    memory = converted(random_memory(shape, {}, draw), state_dtype, dtype)
    weights = weights_to(random_weights(shape, draw), dtype)
    tokens = tokens_to(random_prompt(shape, 64, 1), dtype)
    for capabilities, has_room in (((86,), False), ((90,), True)):
        config = _kernel().CONFIGS[dtype, has_room]
        for num_chunks in (1, len(config.pass_blocks)):
            chunks = make_chunks(*[ChunkSlots(64 // num_chunks)] * num_chunks)
            with compiling_instead_of_launching(capabilities) as compiled:
                _kernel().delta_prefill(memory, chunks, weights, *tokens.all(), config)
            assert len(compiled) == 6 * len(capabilities)
            assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability] for one in compiled)


@only_outside_interpreter
@needs_triton
def test_what_the_kernels_were_not_written_for_goes_to_the_reference():
    draw = torch.Generator().manual_seed(9)

    def is_supported(shape: DeltaShape, state: torch.dtype = torch.float32) -> bool:
        memory = converted(random_memory(shape, {}, draw), state, torch.float32)
        weights = weights_to(random_weights(shape, draw), torch.float32)
        tokens = tokens_to(random_prompt(shape, 1, 1), torch.float32)
        return _kernel().supports(memory, weights, *tokens.all())

    assert is_supported(DeltaShape())
    assert not is_supported(DeltaShape(key_dim=8))
    assert not is_supported(DeltaShape(value_dim=24))
    assert not is_supported(DeltaShape(capacity=65))
    assert not is_supported(DeltaShape(page_tokens=12))
    assert not is_supported(DeltaShape(), torch.float16)
