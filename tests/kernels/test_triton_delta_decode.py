"""The decode step in Triton against its float64 reference, with nonsense wherever nothing is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kiln_nn.kernels.delta_decode import delta_commit, delta_decode
from kiln_nn.kernels.delta_decode.reference import delta_commit_reference, delta_decode_reference
from kiln_nn.kernels.rms_norm import rms_norm
from tests.support.delta_decode import (
    DeltaShape,
    assert_written_alike,
    converted,
    exact,
    layers_stacked,
    make_rows,
    random_memory,
    random_tokens,
    random_weights,
    tokens_to,
    weights_to,
)
from tests.support.rounded_groups import check_groups
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
# float32: sums in another order. The output and the committed state round to bf16 where they are
# bf16: 2^-8 at most, and 1.7e-3 to 2.1e-3 over a whole tensor, which is what correct results rounded once
# show here; the interpreter cuts off instead of rounding.
BF16 = 5e-3 if INTERPRETED else 3e-3
OUT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: BF16}
STATE_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: BF16}
# What meets a bf16 state is split into two bf16 numbers: 2^-17 (2^-16 cut off).
RING_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-5}


def _kernel():
    from kiln_nn.kernels.delta_decode import triton

    return triton


def _kernel_of_commits():
    from kiln_nn.kernels.delta_decode import triton_commit

    return triton_commit


@starts_interpreter
def test_the_kernel_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def _forms(state_dtype: torch.dtype) -> dict:
    """The chosen configuration, with one launch for any number of rows and for none."""
    chosen = _kernel().CONFIGS[state_dtype]
    return {most_rows: replace(chosen, most_rows_at_once=most_rows) for most_rows in (64, 0)}


def _run(
    shape: DeltaShape, rows: tuple, formats: str, config=None, seed: int = 0, *, reads_early: bool = False
) -> None:
    state_dtype, dtype = FORMATS[formats]
    draw = torch.Generator().manual_seed(seed)
    lengths = {row[1]: row[2] for row in rows if row is not None}
    before = converted(random_memory(shape, lengths, draw), state_dtype, dtype, DEVICE)
    weights = weights_to(random_weights(shape, draw), dtype, DEVICE)
    tokens = tokens_to(random_tokens(shape, len(rows), draw), dtype, DEVICE)
    memory = converted(before, state_dtype, dtype, DEVICE)
    assert _kernel().supports(memory, weights, *tokens.all())
    device_rows = make_rows(*rows, device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    out = _kernel().delta_decode(memory, device_rows, weights, *tokens.all(), config, reads_early=reads_early)
    expected_memory, in_float64 = exact(before), torch.float64
    expected = delta_decode_reference(
        expected_memory,
        make_rows(*rows),
        weights_to(weights, in_float64),
        *tokens_to(tokens, in_float64).all(),
    )
    assert out.dtype == dtype
    assert relative_error(out, expected) < OUT_TOLERANCE[dtype]
    assert_written_alike(
        before, memory, expected_memory, STATE_TOLERANCE[state_dtype], RING_TOLERANCE[state_dtype]
    )


# Every length of a page, commits in place and to another slot, a shared checkpoint, padding.
ROWS = (
    (3, 3, 0, None),
    (0, 1, 1, None),
    (0, 2, 2, None),
    None,
    (4, 4, 15, 4),
    (5, 5, 15, 6),
    (7, 7, 9, None),
)


each_format = pytest.mark.parametrize("formats", list(FORMATS))
each_form = pytest.mark.parametrize("most_rows_at_once", [64, 0], ids=["at once", "two launches"])


@on_triton
@each_format
@each_form
def test_rows_of_all_kinds(formats, most_rows_at_once):
    _run(DeltaShape(), ROWS, formats, _forms(FORMATS[formats][0])[most_rows_at_once])


RELEASED = DeltaShape(num_key_heads=1, num_heads=2, key_dim=128, value_dim=128, num_slots=5)


@on_triton
@each_format
def test_the_released_head_shape(formats):
    _run(RELEASED, ((0, 0, 7, None), (1, 2, 15, 3)), formats)


@on_triton
@each_format
@each_form
@pytest.mark.parametrize("reads_early", [False, True])
@pytest.mark.skipif(INTERPRETED, reason="takes a minute there")
def test_the_released_head_shape_in_every_form(formats, most_rows_at_once, reads_early):
    rows = ((0, 0, 7, None), None, (1, 2, 15, 3), (4, 4, 0, None))
    config = _forms(FORMATS[formats][0])[most_rows_at_once]
    _run(RELEASED, rows, formats, config, reads_early=reads_early)


@on_triton
def test_outputs_rounded_by_head():
    """The same rows, and of each head's outputs what rounding them afterwards gives; padding is zero."""
    draw, rows = torch.Generator().manual_seed(0), ((0, 0, 7, None), None, (1, 2, 15, 3))
    before = converted(random_memory(RELEASED, {0: 7, 2: 15}, draw), torch.bfloat16, torch.bfloat16, DEVICE)
    weights = weights_to(random_weights(RELEASED, draw), torch.bfloat16, DEVICE)
    tokens = tokens_to(random_tokens(RELEASED, len(rows), draw), torch.bfloat16, DEVICE)
    config = _forms(torch.bfloat16)[0]

    def step(**options):
        memory = converted(before, torch.bfloat16, torch.bfloat16, DEVICE)
        device_rows = make_rows(*rows, device=DEVICE)
        return _kernel().delta_decode(memory, device_rows, weights, *tokens.all(), config, **options)

    check_groups(step(rounds=True), step().flatten(1), padding=1)


@on_triton
@pytest.mark.parametrize(
    "shape",
    [
        DeltaShape(num_key_heads=1, num_heads=3, capacity=19),
        DeltaShape(num_key_heads=2, num_heads=2, key_dim=32, value_dim=16, conv_width=2),
        DeltaShape(num_key_heads=1, num_heads=1, key_dim=64, value_dim=64, capacity=4, page_tokens=4),
        DeltaShape(num_key_heads=1, num_heads=2, conv_width=3, capacity=40),
    ],
)
@each_form
def test_other_shapes(shape, most_rows_at_once):
    last = min(shape.page_tokens, 32) - 1
    config = _forms(torch.float32)[most_rows_at_once]
    _run(shape, ((0, 1, last, 1), (2, 2, last // 2, None), (3, 4, 1, None)), "float32", config)


@on_triton
@pytest.mark.parametrize("page_tokens", [5, 16, 17, 32, 64])
def test_every_length_of_a_page_as_it_is_chosen(page_tokens):
    shape = DeltaShape(
        num_key_heads=1, num_heads=2, page_tokens=page_tokens, capacity=min(64, page_tokens + 3)
    )
    last = page_tokens - 1
    _run(shape, ((0, 1, last, 1), (2, 2, last // 2, None), (3, 4, 0, None)), "bf16")


@on_triton
@pytest.mark.parametrize(
    ("formats", "uses_tensor_cores"), [("float32", False), ("bf16", True), ("bf16", False)]
)
def test_every_form_computes_the_same(formats, uses_tensor_cores):
    config = _kernel().StepConfig(uses_tensor_cores, block_k=16, num_stages=2)
    _run(DeltaShape(key_dim=32), ROWS, formats, config)


@on_triton
@each_form
@pytest.mark.parametrize("formats", ["float32", "bf16"])
def test_decoding_over_three_pages(formats, most_rows_at_once):
    state_dtype, dtype = FORMATS[formats]
    config = _forms(state_dtype)[most_rows_at_once]
    shape, num_steps = DeltaShape(num_key_heads=1, num_heads=2), 12 if INTERPRETED else 40
    page = 4 if INTERPRETED else 16
    draw = torch.Generator().manual_seed(1)
    memory = converted(random_memory(shape, {}, draw), state_dtype, dtype, DEVICE)
    expected_memory, weights = exact(memory), weights_to(random_weights(shape, draw), dtype, DEVICE)
    outputs, expected = [], []
    for t in range(num_steps):
        tokens = tokens_to(random_tokens(shape, 2, draw), dtype, DEVICE)
        # The first commits in place, the second to its other slot each time.
        own = 2 + t // page % 2
        rows = [(0, 0, t % page, None), (own, own, t % page, None)]
        if t % page == page - 1:
            rows = [(0, 0, t % page, 0), (own, own, t % page, 5 - own)]
        outputs.append(
            _kernel().delta_decode(memory, make_rows(*rows, device=DEVICE), weights, *tokens.all(), config)
        )
        expected.append(
            delta_decode_reference(
                expected_memory,
                make_rows(*rows),
                weights_to(weights, torch.float64),
                *tokens_to(tokens, torch.float64).all(),
            )
        )
    error = relative_error(torch.stack(outputs[page:]), torch.stack(expected[page:]))
    # Committed states were rounded two times by then.
    assert error < (1e-5 if formats == "float32" else 3 * BF16)


@on_triton
def test_strided_projections_and_narrow_slot_numbers():
    shape, draw = DeltaShape(), torch.Generator().manual_seed(2)
    memory = converted(random_memory(shape, {1: 3}, draw), torch.float32, torch.float32, DEVICE)
    expected_memory = exact(memory)
    weights = weights_to(random_weights(shape, draw), torch.float32, DEVICE)
    tokens = tokens_to(random_tokens(shape, 1, draw), torch.float32, DEVICE)
    # One projection's output, cut into the four.
    wide = torch.cat([x.flatten(1) for x in tokens.all()], 1).repeat(1, 2)
    widths = [x[0].numel() for x in tokens.all()]
    mixed, a, b, z = wide[:, : sum(widths)].split(widths, 1)
    rows = make_rows((0, 1, 3, None), device=DEVICE)
    narrow = type(rows)(*(x.int() for x in (rows.read_slots_R, rows.ring_slots_R, rows.lengths_R, rows.commit_slots_R)))  # fmt: skip
    parts = (mixed, a, b, z.view(1, shape.num_heads, shape.value_dim))
    assert _kernel().supports(memory, weights, *parts)
    out = _kernel().delta_decode(memory, narrow, weights, *parts)
    expected = delta_decode_reference(
        expected_memory,
        make_rows((0, 1, 3, None)),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert relative_error(out, expected) < 3e-6


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs a graph")
def test_one_graph_serves_every_length_and_commit():
    shape, draw = DeltaShape(num_key_heads=1, num_heads=2, key_dim=128, value_dim=128), torch.Generator()
    stored = random_memory(shape, {1: 15, 2: 4}, draw.manual_seed(6))
    memory = converted(stored, torch.bfloat16, torch.bfloat16, DEVICE)
    expected_memory = exact(memory)
    weights = weights_to(random_weights(shape, draw), torch.bfloat16, DEVICE)
    tokens = tokens_to(random_tokens(shape, 3, draw), torch.bfloat16, DEVICE)
    rows, graph = make_rows(None, None, None, device=DEVICE), torch.cuda.CUDAGraph()
    delta_decode(memory, rows, weights, *tokens.all())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = delta_decode(memory, rows, weights, *tokens.all())
    real = make_rows((1, 1, 15, 3), None, (2, 2, 4, None))
    for name in ("read_slots_R", "ring_slots_R", "lengths_R", "commit_slots_R"):
        getattr(rows, name).copy_(getattr(real, name))
    graph.replay()
    expected = delta_decode_reference(
        expected_memory,
        real,
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert relative_error(out, expected) < OUT_TOLERANCE[torch.bfloat16]
    assert relative_error(memory.state_SHKV[3], expected_memory.state_SHKV[3]) < BF16


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs launches that overlap")
def test_memory_read_before_the_launch_in_front_has_ended():
    shape, draw = DeltaShape(num_key_heads=2, num_heads=4, key_dim=128, value_dim=128), torch.Generator()
    memory = converted(random_memory(shape, {}, draw.manual_seed(12)), torch.bfloat16, torch.bfloat16, DEVICE)
    expected_memory, layers = exact(memory), memory.as_layers()
    weights = weights_to(random_weights(shape, draw), torch.bfloat16, DEVICE)
    rows, outputs, expected = make_rows(None, None, device=DEVICE), [], []
    for t in range(40):
        place = t % shape.page_tokens
        real = make_rows(
            *((slot, slot, place, slot if place == shape.page_tokens - 1 else None) for slot in (0, 2))
        )
        tokens = tokens_to(random_tokens(shape, 2, draw), torch.bfloat16, DEVICE)
        # As in a pass: what the rows remember is written, a launch waits for that, one starts early behind it.
        for name in ("read_slots_R", "ring_slots_R", "lengths_R", "commit_slots_R"):
            getattr(rows, name).copy_(getattr(real, name))
        z_RHV = rms_norm(tokens.z_RHV.clone(), torch.ones_like(weights.norm_V), 1e-6, offset=0.0)
        inputs = (tokens.mixed_RC, tokens.a_RH, tokens.b_RH, z_RHV)
        outputs.append(delta_decode(memory, rows, weights, *inputs, commits=False, reads_early=True))
        delta_commit(layers, rows)
        in_float64 = (x.double().cpu() for x in inputs)
        expected.append(
            delta_decode_reference(expected_memory, real, weights_to(weights, torch.float64), *in_float64)
        )
    assert relative_error(torch.stack(outputs), torch.stack(expected)) < 3 * BF16


@on_triton
def test_the_comparison_sees_a_wiped_state():
    shape, draw = DeltaShape(), torch.Generator().manual_seed(8)
    memory = converted(random_memory(shape, {1: 3}, draw), torch.float32, torch.float32, DEVICE)
    expected_memory = exact(memory)
    weights = weights_to(random_weights(shape, draw), torch.float32, DEVICE)
    tokens = tokens_to(random_tokens(shape, 1, draw), torch.float32, DEVICE)
    memory.state_SHKV[0] = 0
    out = _kernel().delta_decode(memory, make_rows((0, 1, 3, None), device=DEVICE), weights, *tokens.all())
    expected = delta_decode_reference(
        expected_memory,
        make_rows((0, 1, 3, None)),
        weights_to(weights, torch.float64),
        *tokens_to(tokens, torch.float64).all(),
    )
    assert relative_error(out, expected) > 0.05


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize(
    ("is_dependent", "capabilities"), [(False, (86,)), (True, (90,))], ids=["plain", "dependent"]
)
@pytest.mark.parametrize("formats", ["bf16 around float32", "bf16"])
def test_it_compiles_for_every_supported_gpu(monkeypatch, formats, is_dependent, capabilities):
    monkeypatch.setattr(_kernel(), "supports_dependent_launch", lambda device: is_dependent)
    state_dtype, dtype = FORMATS[formats]
    shape = DeltaShape(num_key_heads=16, num_heads=32, key_dim=128, value_dim=128, num_slots=1)
    draw = torch.Generator().manual_seed(7)
    memory = converted(random_memory(shape, {}, draw), state_dtype, dtype)
    weights = weights_to(random_weights(shape, draw), dtype)
    tokens = tokens_to(random_tokens(shape, 1, draw), dtype)
    with compiling_instead_of_launching(capabilities) as compiled:
        for config in _forms(state_dtype).values():
            _kernel().delta_decode(memory, make_rows((0, 0, 0, None)), weights, *tokens.all(), config)
        _kernel_of_commits().delta_commit(layers_stacked([memory]), make_rows((0, 0, 0, None)))
    assert tuple(one.capability for one in compiled) == capabilities * 6
    # A multiprocessor should hold at least two programs.
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability] // 2 for one in compiled)


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("page_tokens", [4, 16, 32, 64])
def test_few_rows_are_taken_at_once_where_the_registers_have_room(monkeypatch, page_tokens):
    monkeypatch.setattr(_kernel(), "supports_dependent_launch", lambda device: True)
    shape = DeltaShape(
        num_key_heads=16, num_heads=32, key_dim=128, value_dim=128, num_slots=1,
        page_tokens=page_tokens, capacity=page_tokens,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(7)
    memory = converted(random_memory(shape, {}, draw), torch.bfloat16, torch.bfloat16)
    weights = weights_to(random_weights(shape, draw), torch.bfloat16)
    tokens = tokens_to(random_tokens(shape, 1, draw), torch.bfloat16)
    with compiling_instead_of_launching((90,)) as compiled:
        _kernel().delta_decode(memory, make_rows((0, 0, 0, None)), weights, *tokens.all(), commits=False)
    at_once, in_two = ["delta_few_rows_kernel"], ["delta_keys_kernel", "delta_values_kernel"]
    assert [one.name for one in compiled] == (at_once if page_tokens <= 16 else in_two)
    assert [one.spilled_bytes for one in compiled] == [0] * len(compiled)


@only_outside_interpreter
@needs_triton
def test_what_the_kernel_was_not_written_for_goes_to_the_reference():
    draw = torch.Generator().manual_seed(9)

    def is_supported(shape: DeltaShape, state: torch.dtype = torch.float32) -> bool:
        memory = converted(random_memory(shape, {}, draw), state, torch.float32)
        weights = weights_to(random_weights(shape, draw), torch.float32)
        return _kernel().supports(
            memory, weights, *tokens_to(random_tokens(shape, 1, draw), torch.float32).all()
        )

    assert is_supported(DeltaShape())
    assert not is_supported(DeltaShape(key_dim=8))
    assert not is_supported(DeltaShape(value_dim=24))
    assert not is_supported(DeltaShape(capacity=65))
    assert not is_supported(DeltaShape(page_tokens=3))
    assert not is_supported(DeltaShape(), torch.float16)


@on_triton
@pytest.mark.parametrize("formats", list(FORMATS))
def test_committing_all_layers_after_the_step(formats):
    state_dtype, dtype = FORMATS[formats]
    shape, draw = DeltaShape(), torch.Generator().manual_seed(11)
    rows = make_rows(*ROWS)
    lengths = {row[1]: row[2] + 1 for row in ROWS if row is not None}
    before = [converted(random_memory(shape, lengths, draw), state_dtype, dtype, DEVICE) for _ in range(3)]
    layers, expected = layers_stacked(before), layers_stacked([exact(one) for one in before])
    _kernel_of_commits().delta_commit(layers, make_rows(*ROWS, device=DEVICE))
    delta_commit_reference(expected, rows)
    for index, one in enumerate(before):
        tolerances = STATE_TOLERANCE[state_dtype], RING_TOLERANCE[state_dtype]
        assert_written_alike(one, layers.layer(index), expected.layer(index), *tolerances)
    assert not torch.equal(layers.state_SHKV[2, 4], before[2].state_SHKV[4])


@on_triton
@pytest.mark.parametrize("formats", list(FORMATS))
def test_steps_that_leave_their_commits_to_the_end(formats):
    state_dtype, dtype = FORMATS[formats]
    wide = DeltaShape(num_key_heads=1, num_heads=2, key_dim=128, value_dim=128, num_slots=5)
    for shape, rows in ((DeltaShape(), ROWS), (wide, ((0, 0, 15, 0), (1, 2, 15, 3), (4, 4, 6, None)))):
        draw = torch.Generator().manual_seed(13)
        lengths = {row[1]: row[2] for row in rows if row is not None}
        before = [
            converted(random_memory(shape, lengths, draw), state_dtype, dtype, DEVICE) for _ in range(2)
        ]
        layers, expected = layers_stacked(before), [exact(one) for one in before]
        device_rows = make_rows(*rows, device=DEVICE)
        for index in range(2):
            weights = weights_to(random_weights(shape, draw), dtype, DEVICE)
            tokens = tokens_to(random_tokens(shape, len(rows), draw), dtype, DEVICE)
            memory = layers.layer(index)
            out = _kernel().delta_decode(memory, device_rows, weights, *tokens.all(), commits=False)
            in_float64 = tokens_to(tokens, torch.float64).all()
            exact_out = delta_decode_reference(
                expected[index], make_rows(*rows), weights_to(weights, torch.float64), *in_float64
            )
            assert relative_error(out, exact_out) < OUT_TOLERANCE[dtype]
            assert torch.equal(memory.state_SHKV, before[index].state_SHKV)
        _kernel_of_commits().delta_commit(layers, device_rows)
        for index, one in enumerate(before):
            tolerances = STATE_TOLERANCE[state_dtype], RING_TOLERANCE[state_dtype]
            assert_written_alike(one, layers.layer(index), expected[index], *tolerances)
