"""What the adapter store adds to a linear layer, fused or module by module, eager or for a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kiln_engine.domain import BatchPlan, DecodeRow, PrefillChunk, RowSampling, SamplingParams
from kiln_engine.execution import adapter_upload
from kiln_engine.execution.adapter_store import AdapterRejected, AdapterRows, AdapterStore
from kiln_nn.config import ModelConfig
from kiln_nn.lora import Matrix, adapter_table, mtp_table, serialize_adapter
from kiln_nn.lora.parameters import LoraParameters
from tests.support.lora_builders import random_lora, safetensors_of
from tests.support.tiny_models import tiny_config

AdapterSlots = tuple[tuple[int, float], ...]
GREEDY = RowSampling(params=SamplingParams(temperature=0.0), output_index=0)
ADAPTERS: dict[int, dict[str, Any]] = {
    1: {"rank": 3, "seed": 5, "with_mtp": True},
    2: {"rank": 8, "seed": 6, "targets": "attention"},
    3: {"rank": 1, "seed": 7, "targets": ("down_proj", "in_proj_b", "k_proj")},
}
FUSED = {
    "model.layers.0.linear_attn.in_proj": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    "model.layers.3.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "model.layers.3.mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "model.layers.0.mlp.down_proj": ("down_proj",),
    "model.layers.0.linear_attn.out_proj": ("out_proj",),
    "mtp.fc": ("fc",),
    "mtp.layers.0.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mtp.layers.0.self_attn.kv_proj": ("k_proj", "v_proj"),
    "mtp.layers.0.mlp.down_proj": ("down_proj",),
}


def linear_layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """All that a store of an engine that drafts by the MTP layer has places for."""
    return adapter_table(config) | mtp_table(config)


def row(adapter_slots: AdapterSlots = ()) -> DecodeRow:
    return DecodeRow(0, 1, 0, (0,), 0, 0, None, adapter_slots, GREEDY)


def chunk(num_tokens: int, adapter_slots: AdapterSlots = ()) -> PrefillChunk:
    return PrefillChunk(0, (1,) * num_tokens, 0, (0,), None, 0, (), adapter_slots, None)


PLAN = BatchPlan(
    0,
    (row(((2, 1.0),)), row(), row(((1, 0.5), (2, -2.0))), row(((3, 1.0), (1, 1.0), (3, 0.5)))),
    (chunk(5), chunk(7, ((1, 1.0),)), chunk(20, ((3, 2.0),))),
)
# The same by token.
SLOTS: list[AdapterSlots] = [
    ((2, 1.0),), (), ((1, 0.5), (2, -2.0)), ((3, 1.5), (1, 1.0)), *[()] * 5, *[((1, 1.0),)] * 7, *[((3, 2.0),)] * 20
]  # fmt: skip


class Loaded:
    """A store with three adapters, of which one adapts the MTP layer, and their values."""

    def __init__(self, device: str = "cpu", *, with_mtp: bool = True) -> None:
        self.config = tiny_config(layer_types=(("linear_attention",) * 3 + ("full_attention",)))
        self.store = AdapterStore(
            self.config,
            num_slots=4,
            max_rank=8,
            dtype=torch.float32,
            device=torch.device(device),
            with_mtp=with_mtp,
        )
        self.loras = {slot: random_lora(self.config, **fields) for slot, fields in ADAPTERS.items()}
        for slot, lora in self.loras.items():
            self.upload(slot, lora)

    def upload(self, slot: int, lora: LoraParameters) -> None:
        config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
        self.store.stage(slot, adapter_bytes, config_json)
        self.store.activate(slot)

    def expected(self, path: str, x_TI: torch.Tensor, slots: list[AdapterSlots]) -> torch.Tensor:
        """What is added, from the adapters themselves, one token at a time in float64."""
        num_outputs = linear_layers(self.config)[path][1]
        out = torch.zeros(len(slots), num_outputs, dtype=torch.float64)
        for token, uses in enumerate(slots):
            for slot, scale in uses:
                pair = self.loras[slot].tensors().get(path)
                if pair is not None:
                    a, b = (values.detach().double() for values in pair)
                    out[token] += scale * self.loras[slot].spec.scaling * b @ (a @ x_TI[token].double())
        return out


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded()


def check(loaded: Loaded, rows: AdapterRows, slots: list[AdapterSlots]) -> None:
    """All fused layers, whole and module by module; float32 sums in another order stay below 1e-5."""
    generator = torch.Generator().manual_seed(1)
    table = linear_layers(loaded.config)
    for fused_path, names in FUSED.items():
        paths = [f"{fused_path.rpartition('.')[0]}.{name}" for name in names]
        x_TI = torch.randn(len(slots), table[paths[0]][0], generator=generator)
        wanted = [loaded.expected(path, x_TI, slots) for path in paths]
        whole = torch.randn(len(slots), sum(part.shape[1] for part in wanted), generator=generator)
        before = whole.clone()
        loaded.store.add_(fused_path, x_TI, whole, rows)
        torch.testing.assert_close(whole, before + torch.cat(wanted, 1).float(), rtol=1e-5, atol=1e-5)
        idle = [token for token, uses in enumerate(slots) if not uses]
        assert torch.equal(whole[idle], before[idle])
        for path, part in zip(paths, wanted, strict=True):
            y_TO = torch.ones(len(slots), part.shape[1] + 3)[:, :-3]
            loaded.store.add_(path, x_TI, y_TO, rows)
            torch.testing.assert_close(y_TO, 1 + part.float(), rtol=1e-5, atol=1e-5)


def test_rows_of_one_step(loaded: Loaded):
    rows = loaded.store.rows_for(PLAN)
    assert rows is not None
    check(loaded, rows, SLOTS)


def test_rows_that_stay_in_place_serve_one_step_after_the_other(loaded: Loaded):
    static = loaded.store.static_rows(40)
    for plan, slots in (
        (PLAN, SLOTS),
        (BatchPlan(0, PLAN.decode_rows), SLOTS[:4]),
        (BatchPlan(0, (row(),)), []),
        (BatchPlan(0, (row(), row(((2, 3.0),)))), [(), ((2, 3.0),)]),
    ):
        assert static.fill_(plan) == any(slots)
        check(loaded, static.rows, slots + [()] * (40 - len(slots)))


def test_any_mixture_fits_into_rows_that_stay_in_place(loaded: Loaded):
    static = loaded.store.static_rows(33)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        slots: list[AdapterSlots] = []
        for _ in range(33):
            chosen = torch.randperm(3, generator=generator)[: int(torch.randint(4, (), generator=generator))]
            slots.append(tuple((int(slot) + 1, 1.0 + int(slot)) for slot in chosen))
        static.fill_(BatchPlan(0, tuple(row(uses) for uses in slots)))
        check(loaded, static.rows, slots)


def test_without_adapters_there_is_nothing_to_add(loaded: Loaded):
    plan = BatchPlan(0, (row(), row(((0, 1.0),))), (chunk(4),))
    assert loaded.store.rows_for(plan) is None


def test_a_layer_that_cannot_be_adapted_stays_as_it_is(loaded: Loaded):
    rows = loaded.store.rows_for(PLAN)
    assert rows is not None
    y_TO = torch.randn(len(SLOTS), 10)
    before = y_TO.clone()
    loaded.store.add_("lm_head", torch.randn(len(SLOTS), 10), y_TO, rows)
    assert torch.equal(y_TO, before)


def test_a_slot_keeps_nothing_of_the_adapter_before():
    """A lower rank, and modules that the new adapter lacks."""
    loaded = Loaded()
    loaded.store.clear(1)
    loaded.loras[1] = random_lora(loaded.config, rank=2, seed=9, targets=("k_proj", "in_proj_z"))
    loaded.upload(1, loaded.loras[1])
    rows = loaded.store.rows_for(PLAN)
    assert rows is not None
    check(loaded, rows, SLOTS)
    static = loaded.store.static_rows(len(SLOTS))
    static.fill_(PLAN)
    check(loaded, static.rows, SLOTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_mtp", [False, True])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_upload_puts_the_same_numbers_into_the_same_places(file_dtype, with_mtp, monkeypatch):
    """In many pieces, over the remains of another adapter, in the tables' format."""
    monkeypatch.setattr(adapter_upload, "_PIECE_BYTES", 40_000)
    config = tiny_config(layer_types=(("linear_attention",) * 3 + ("full_attention",)))
    stores = [
        AdapterStore(
            config,
            num_slots=2,
            max_rank=8,
            dtype=torch.bfloat16,
            device=torch.device(device),
            with_mtp=with_mtp,
        )
        for device in ("cpu", "cuda")
    ]
    for fields in (
        {"rank": 8, "seed": 5, "with_mtp": True},
        {"rank": 3, "seed": 6, "targets": ("q_proj", "down_proj")},
    ):
        lora = random_lora(config, **fields)
        tensors = {path: (a.to(file_dtype), b.to(file_dtype)) for path, (a, b) in lora.tensors().items()}
        config_json, adapter_bytes = serialize_adapter(tensors, lora.spec, "tiny")
        for store in stores:
            store.clear(2)
            store.stage(2, adapter_bytes, config_json)
            store.activate(2)
        rank = lora.spec.rank
        for path in linear_layers(config) if with_mtp else adapter_table(config):
            on_cpu, on_gpu = (store._tables.places(rank)[path] for store in stores)
            for wanted, got in zip(on_cpu, on_gpu, strict=True):
                assert torch.equal(got[1].cpu(), wanted[1]), path
                assert not got[0].any(), path
    bad = {path: (a.fill_(float("inf")), b) for path, (a, b) in tensors.items()}
    stores[1].clear(2)
    with pytest.raises(AdapterRejected, match="NaN or infinity"):
        stores[1].stage(2, safetensors_of(bad), config_json)
    with pytest.raises(KeyError):
        stores[1].activate(2)


def test_what_is_not_finite_or_of_mixed_formats_is_told_apart():
    loaded = Loaded()
    tensors = dict(random_lora(loaded.config, rank=2, seed=3).tensors())
    config_json, _ = serialize_adapter(tensors, random_lora(loaded.config, rank=2).spec, "tiny")
    path = next(iter(tensors))
    a, b = tensors[path]
    loaded.store.stage(4, safetensors_of({**tensors, path: (a.half(), b.bfloat16())}), config_json)
    loaded.store.activate(4)
    loaded.store.clear(4)
    bad = safetensors_of({**tensors, path: (torch.full_like(a, float("nan")), b)})
    with pytest.raises(AdapterRejected, match=f"{path}.lora_A holds NaN"):
        loaded.store.stage(4, bad, config_json)
    with pytest.raises(KeyError):
        loaded.store.activate(4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["model.layers.3.self_attn.qkv_proj", "mtp.layers.0.self_attn.kv_proj"])
def test_one_captured_graph_serves_any_mixture(path: str):
    loaded = Loaded("cuda")
    paths = [f"{path.rpartition('.')[0]}.{name}" for name in FUSED[path]]
    static = loaded.store.static_rows(40)
    table = linear_layers(loaded.config)
    x_TI = torch.randn(40, table[paths[0]][0], device="cuda")
    y_TO = torch.zeros(40, sum(table[each][1] for each in paths), device="cuda")
    loaded.store.add_(path, x_TI, y_TO, static.rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TO.zero_()
        loaded.store.add_(path, x_TI, y_TO, static.rows)
    seen = []
    for _ in range(4):  # more steps than there are buffers on the host, none waited for
        for plan, slots in (
            (PLAN, SLOTS),
            (BatchPlan(0, PLAN.decode_rows), SLOTS[:4]),
            (BatchPlan(0, (row(),)), []),
        ):
            static.fill_(plan)
            graph.replay()
            seen.append((slots + [()] * (40 - len(slots)), y_TO.clone()))
    for slots, got in seen:
        wanted = torch.cat([loaded.expected(each, x_TI.cpu(), slots) for each in paths], 1)
        # Products of the GPU in float32, not in tf32.
        torch.testing.assert_close(got.cpu(), wanted.float(), rtol=1e-5, atol=1e-5)
    eager = torch.zeros_like(y_TO)[: len(SLOTS)]
    rows = loaded.store.rows_for(PLAN)
    assert rows is not None
    loaded.store.add_(path, x_TI[: len(SLOTS)], eager, rows)
    assert torch.equal(eager, seen[0][1][: len(SLOTS)])


@pytest.mark.parametrize("drafts", [False, True])
def test_matrices_of_the_mtp_layer_are_taken_and_change_no_answer(drafts: bool):
    """The main model's layers get what they got without."""
    stores = [Loaded(with_mtp=drafts), Loaded(with_mtp=drafts)]
    fields = {"rank": 3, "seed": 5}
    for loaded, with_mtp in zip(stores, (False, True), strict=True):
        loaded.store.clear(1)
        loaded.upload(1, random_lora(loaded.config, **fields, with_mtp=with_mtp))
    config, plan = stores[0].config, BatchPlan(0, (row(((1, 1.0),)), row(), row(((1, 0.5), (2, 1.0)))))
    for path, (num_inputs, num_outputs) in adapter_table(config).items():
        x = torch.randn(3, num_inputs, generator=torch.Generator().manual_seed(1))
        results = []
        for loaded in stores:
            y = torch.zeros(3, num_outputs)
            loaded.store.add_(path, x, y, loaded.store.rows_for(plan))
            results.append(y)
        assert torch.equal(*results), path


def test_nothing_of_the_mtp_layer_is_kept_where_it_makes_no_drafts():
    loaded = Loaded(with_mtp=False)
    rows = loaded.store.rows_for(PLAN)
    assert rows is not None
    for path, (num_inputs, num_outputs) in mtp_table(loaded.config).items():
        y_TO = torch.ones(len(SLOTS), num_outputs)
        loaded.store.add_(path, torch.randn(len(SLOTS), num_inputs), y_TO, rows)
        assert y_TO.eq(1).all()
    widths = sum(map(sum, mtp_table(loaded.config).values()))
    assert Loaded().store.num_bytes - loaded.store.num_bytes == 4 * 8 * widths * 4


def test_pieces_of_a_file_leave_out_what_lies_between_them():
    """A foreign file may have other tensors among those that go to the tables."""

    def matrix(start: int) -> Matrix:
        return Matrix("m", start, (25,), torch.float32)

    pieces = adapter_upload._pieces([matrix(0), matrix(100), matrix(900), matrix(1000)], 300)
    assert [(piece.first, piece.end, piece.start, piece.stop) for piece in pieces] == [
        (0, 2, 0, 200), (2, 4, 900, 1100),
    ]  # fmt: skip
