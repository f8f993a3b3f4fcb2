"""Drafts of adapters that have matrices for the multi-token-prediction layer, in float32.

The reference is the packed form, which training runs, with those matrices merged into the layer's. Sums in
another order stay below 1e-5; the drafts are the same token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from demo.data.rendering import render_prompt
from kiln_engine.domain import (
    AdapterUse,
    BatchPlan,
    DecodeRow,
    GenerationRequest,
    RowSampling,
    SamplingParams,
)
from kiln_engine.domain.adapter import AdapterChange, AdapterVersion
from kiln_engine.execution.adapter_store import AdapterRejected, AdapterStore
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.model import Linears
from kiln_engine.model.mtp_layer import DraftPlaces
from kiln_engine.scheduling import Scheduler
from kiln_engine.speculation.speculator import DraftSpeculator
from kiln_nn.config import ModelConfig
from kiln_nn.lora import serialize_adapter
from kiln_nn.lora.parameters import LoraParameters
from tests.support.demo_serving import DEMO_MODEL
from tests.support.engine_plans import AdapterSlots, EngineRig, relative_error, token_ids
from tests.support.engine_serving import (
    KERNEL_SHAPE,
    Answer,
    SlottedRequest,
    capture,
    make_runner,
    serve,
)
from tests.support.lora_builders import random_lora, safetensors_of
from tests.support.packed_mtp import PackedMtp
from tests.support.recorded_drafts import record_drafts
from tests.support.tiny_models import make_checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = 1e-5
TOKENS = token_ids(90, seed=5)
MAX_DRAFTS = 3
# With matrices for the layer, without, and with: of different rank.
ADAPTERS = {
    1: {"rank": 3, "seed": 5, "with_mtp": True},
    2: {"rank": 8, "seed": 6, "targets": "attention"},
    3: {"rank": 5, "seed": 7, "targets": ("down_proj",), "with_mtp": True},
}
MIXTURE: tuple[AdapterSlots, ...] = (
    (),
    ((1, 1.0),),
    ((2, 1.0),),
    ((3, 0.5), (1, -1.0)),
    ((2, 0.5), (3, 2.0)),
)


def upload(store: AdapterStore, slot: int, lora: LoraParameters) -> None:
    config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
    store.stage(slot, adapter_bytes, config_json)
    store.activate(slot)


def loras_of(config: ModelConfig) -> dict[int, LoraParameters]:
    return {slot: random_lora(config, **fields) for slot, fields in ADAPTERS.items()}


def packed_with(
    folder: Path,
    loras: dict[int, LoraParameters],
    slots: AdapterSlots,
    dtype: torch.dtype = torch.float32,
) -> PackedMtp:
    return PackedMtp(folder, adapters=[(loras[slot], scale) for slot, scale in slots], dtype=dtype)


class Rig(EngineRig):
    """A rig on the tiny model with the three adapters."""

    def __init__(self, folder: Path, **options) -> None:
        super().__init__(folder, mtp_hidden="normed", max_draft_tokens=MAX_DRAFTS, **options)
        self.loras = loras_of(self.config)
        for slot, lora in self.loras.items():
            upload(self.adapters, slot, lora)

    @torch.inference_mode()
    def last_states(self, sequences: Sequence, tokens: Sequence[int]) -> torch.Tensor:
        """The layer's states for the next tokens, which attend to all entries that passes have written."""
        layer, device = self.model.mtp, self.model.device
        assert layer is not None
        slots = torch.tensor([sequence.state_slot for sequence in sequences], device=device)
        positions = torch.tensor([sequence.num_computed for sequence in sequences], device=device)
        for sequence in sequences:
            self.cover(sequence, sequence.num_computed + 1)
        plan = BatchPlan(0, tuple(map(self.decode, sequences, tokens)))
        self.model.pages.update(plan)
        room = torch.tensor([len(each.page_ids) * self.page_tokens for each in sequences], device=device)
        rows = self.adapters.rows_for(plan)
        linears = Linears(self.model.matrices, None if rows is None else self.adapters.of_step(rows))
        fed = torch.tensor(tokens, device=device), layer.carried.last(slots), positions
        return layer.forward(*fed, DraftPlaces(slots, room), linears)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp_adapters")
    make_checkpoint(folder, seed=8)
    return folder


def check_entries(rig: Rig, folder: Path, tolerance: float) -> None:
    """Prompts in chunks, then decode rows, of all mixtures side by side."""
    sequences = [rig.sequence(slots) for slots in MIXTURE]
    texts = [TOKENS[number : number + 48 + number] for number in range(len(MIXTURE))]
    for start, end in ((0, 16), (16, 40)):
        rig.step(
            chunks=[rig.chunk(each, text[start:end]) for each, text in zip(sequences, texts, strict=True)]
        )
    while rows := [
        rig.decode(each, text[each.num_computed])
        for each, text in zip(sequences, texts, strict=True)
        if each.num_computed < len(text) - 1
    ]:
        rig.step(rows)
    states = rig.last_states(sequences, [text[-1] for text in texts]).float().cpu()
    expected = []
    for slots, text in zip(MIXTURE, texts, strict=True):
        packed = packed_with(folder, rig.loras, slots)
        expected.append(packed.states(text, packed.hidden(text))[len(text) - 2])
    assert relative_error(states, torch.stack(expected)) < tolerance
    # An adapter's matrices for the layer make a difference beside those for the model.
    main = {path: pair for path, pair in rig.loras[1].tensors().items() if not path.startswith("mtp.")}
    without = PackedMtp(folder, adapters=[(LoraParameters(rig.loras[1].spec, main), 1.0)])
    left_aside = without.states(texts[1], without.hidden(texts[1]))[len(texts[1]) - 2]
    assert relative_error(left_aside[None], expected[1][None]) > 0.05


def test_entries_of_rows_with_different_adapters_are_those_of_the_merged_layers(folder):
    check_entries(Rig(folder), folder, TOLERANCE)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_entries_on_a_gpu_are_those_of_the_merged_layers(tmp_path, dtype, tolerance):
    """bfloat16: some tens of roundings of 0.4 % on the way. The shape is one that the kernels take."""
    make_checkpoint(tmp_path, seed=8, **KERNEL_SHAPE)
    check_entries(Rig(tmp_path, device="cuda", dtype=dtype), tmp_path, tolerance)


PROMPTS = (
    "Reply to this email about the late invoice.",
    "What is 27 + 35?",
    "Write a short email about the broken lamp.",
    "Thank Omar for the spare key.",
    "What is 9 + 8?",
)


@cache
def demo_config() -> ModelConfig:
    return ModelConfig.from_folder(DEMO_MODEL)


def draws_apart(lora: LoraParameters) -> LoraParameters:
    """Weak in the model, where sums in another order would make noise of it, and strong in the layer."""
    tensors = {
        path: (a, (4 if path.startswith("mtp.") else 0.05) * b) for path, (a, b) in lora.tensors().items()
    }
    return LoraParameters(lora.spec, tensors)


@cache
def demo_loras() -> dict[int, LoraParameters]:
    return {slot: draws_apart(lora) for slot, lora in loras_of(demo_config()).items()}


@cache
def prompt(number: int) -> tuple[int, ...]:
    text = render_prompt([{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}])
    return tuple(Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(text).ids)


def demo_requests(max_tokens: int = 14) -> list[SlottedRequest]:
    made: list[SlottedRequest] = []
    for number, slots in enumerate(MIXTURE):
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0 if number % 2 else 0.8, seed=number, ignore_eos=True
        )
        uses = tuple(AdapterUse(f"sha-{slot}", scale) for slot, scale in slots)
        made.append((GenerationRequest(f"r{number}", prompt(number), sampling, adapters=uses), slots))
    return made


def demo_runner(device: str = "cpu", *, drafts: bool = True, **memory):
    if drafts:
        memory |= {"max_draft_tokens": MAX_DRAFTS, "drafts_by_mtp": True}
    runner, limits = make_runner(DEMO_MODEL, device=device, num_adapter_slots=3, **memory)
    for slot, lora in demo_loras().items():
        upload(runner.adapters, slot, lora)
    return runner, limits


def longest() -> DraftSpeculator:
    return DraftSpeculator(MAX_DRAFTS, [1, 2, 4, 8], drafts_on_device=True, is_adaptive=False)


def decode_row(slot: int) -> DecodeRow:
    """A row that uses the adapter of a slot."""
    sampling = RowSampling(SamplingParams(temperature=0.0), output_index=0)
    return DecodeRow(0, 1, 0, (0,), 0, 0, None, ((slot, 1.0),), sampling)


@cache
def plain_answers() -> dict[str, Answer]:
    runner, limits = demo_runner(drafts=False)
    return serve(runner, limits, demo_requests())


def check_answers(answers: dict[str, Answer], tolerance: float = 1e-4) -> None:
    for request_id, plain in plain_answers().items():
        assert answers[request_id].tokens == plain.tokens, request_id
        assert answers[request_id].logprobs == pytest.approx(plain.logprobs, abs=tolerance)


def check_drafts(seen, answers: dict[str, Answer]) -> int:
    """Every draft against the merged layers'; returns how many there were."""
    num_drafts = 0
    for sequence_id, (request, slots) in zip(sorted(seen), demo_requests(), strict=True):
        packed = packed_with(DEMO_MODEL, demo_loras(), slots, torch.float64)
        text = [*request.prompt_token_ids, *answers[request.request_id].tokens]
        hidden_TD = packed.hidden(text)
        for drafted in seen[sequence_id]:
            known, count = text[: drafted.num_tokens], len(drafted.draft_ids)
            expected = packed.drafts(known, count, drafted.samplings, hidden_TD)
            assert drafted.draft_ids == expected, (request.request_id, drafted.num_tokens)
            num_drafts += count
    return num_drafts


@pytest.mark.parametrize("is_captured", [False, True])
def test_every_draft_is_the_merged_layers_and_no_answer_changes(is_captured, monkeypatch):
    """Rows without an adapter, with one, with two, one batch: as launched, and over a graph's buffers."""
    runner, limits = demo_runner()
    if is_captured:
        capture(runner, monkeypatch)
    seen = record_drafts(runner, monkeypatch)
    answers = serve(runner, limits, demo_requests(), speculator=longest(), steps_between=0)
    check_answers(answers)
    assert check_drafts(seen, answers) > 40


@pytest.mark.gpu
@needs_gpu
def test_every_draft_of_captured_graphs_is_the_merged_layers(monkeypatch):
    runner, limits = demo_runner("cuda")
    capture(runner, monkeypatch)
    seen = record_drafts(runner, monkeypatch)
    answers = serve(runner, limits, demo_requests(), speculator=longest(), steps_between=0)
    check_answers(answers, 1e-3)
    assert check_drafts(seen, answers) > 40


def with_other_layer(lora: LoraParameters, seed: int | None) -> LoraParameters:
    """The same adapter of the model with other matrices for the layer, or none."""
    other = random_lora(demo_config(), rank=lora.spec.rank, seed=seed or 0, with_mtp=True)
    other_layer = draws_apart(other).tensors()
    tensors = {
        path: other_layer[path] if path.startswith("mtp.") else pair
        for path, pair in lora.tensors().items()
        if seed or not path.startswith("mtp.")
    }
    return LoraParameters(lora.spec, tensors)


def test_pages_of_one_adapters_layer_serve_no_other(monkeypatch):
    """Adapters that are the same in the model, one prompt, one cache: entries in shared pages would be the other's."""
    runner, limits = demo_runner()
    first = demo_loras()[1]
    loras = {1: first, 2: with_other_layer(first, 31), 3: with_other_layer(first, None)}
    for slot, lora in loras.items():
        runner.adapters.clear(slot)
        upload(runner.adapters, slot, lora)
    seen = record_drafts(runner, monkeypatch)
    scheduler = Scheduler(limits, frozenset(), longest())
    text = prompt(0) + prompt(2)
    for turn, slot in enumerate((1, 2, 3, 1), start=1):
        sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(f"r{turn}", text, sampling, adapters=(AdapterUse(f"sha-{slot}"),))
        answer = serve(runner, limits, [(request, ((slot, 1.0),))], scheduler=scheduler)[f"r{turn}"]
        assert bool(answer.num_cached_tokens) == (turn == 4)
        if turn == 4:
            break
        packed = packed_with(DEMO_MODEL, loras, ((slot, 1.0),), torch.float64)
        known = [*text, *answer.tokens]
        hidden_TD = packed.hidden(known)
        for drafted in seen[turn]:
            before, count = known[: drafted.num_tokens], len(drafted.draft_ids)
            assert drafted.draft_ids == packed.drafts(before, count, drafted.samplings, hidden_TD)
    # Not because the layer's matrices make no difference.
    assert len({str([each.draft_ids for each in seen[turn]]) for turn in (1, 2, 3)}) == 3


def test_a_slot_keeps_nothing_of_the_layer_before():
    """An adapter without matrices for the layer in a slot of one with them: the base model's again."""
    runner, _ = demo_runner()
    runner.adapters.clear(1)
    upload(runner.adapters, 1, with_other_layer(demo_loras()[1], None))
    path, num_inputs = "mtp.layers.0.self_attn.qkv_proj", demo_config().hidden_size
    linears = runner._linears(BatchPlan(0, (decode_row(1), decode_row(3))))
    x = torch.randn(2, num_inputs, generator=torch.Generator().manual_seed(1))
    adapted, base = linears.apply(path, x), Linears(runner.model.matrices).apply(path, x)
    assert adapted[0].equal(base[0])
    assert not adapted[1].allclose(base[1])


def test_a_version_that_changes_in_an_answer_drafts_with_its_own_layer(monkeypatch):
    """The answer is what it is without drafts, where the version changes at the same token."""
    old, new = ((1, 1.0),), ((3, 1.0),)
    uses = (AdapterUse("sha-3"),)
    change = AdapterChange((AdapterVersion("a", 2, "sha-3"),), uses, new)
    sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)
    request = GenerationRequest("r", prompt(2), sampling, adapters=(AdapterUse("sha-1"),))
    moved_at: list[int] = []

    def run(runner: TorchRunner, limits, speculator: DraftSpeculator | None) -> Answer:
        def on_step(number: int, scheduler: Scheduler) -> None:
            (sequence,) = scheduler.running or (None,)
            wanted = 8 if speculator else moved_at[0]
            if sequence and sequence.num_outputs >= wanted and sequence.adapter_slots == old:
                moved_at.append(sequence.num_outputs)
                assert scheduler.move("r", change)

        return serve(runner, limits, [(request, old)], speculator=speculator, run_ahead=0, on_step=on_step)[
            "r"
        ]

    runner, limits = demo_runner()
    used: list[AdapterSlots] = []
    runner_linears = runner._linears

    def look(plan: BatchPlan, num_lines: int = 0) -> Linears:
        if num_lines:
            used.extend(row.adapter_slots for row in plan.verify_rows)
        return runner_linears(plan, num_lines)

    monkeypatch.setattr(runner, "_linears", look)
    drafted = run(runner, limits, longest())
    plain = run(*demo_runner(drafts=False), None)
    assert moved_at[0] == moved_at[1]
    assert drafted.tokens == plain.tokens
    assert drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    num_old = used.index(new)
    assert used == [old] * num_old + [new] * (len(used) - num_old)
    assert num_old > 2
    assert len(used) - num_old > 2


def test_matrices_for_the_layer_are_checked_and_left_aside_where_nobody_drafts():
    config = demo_config()
    lora = demo_loras()[1]
    runner, _ = demo_runner(drafts=False)
    linears = runner._linears(BatchPlan(0, (decode_row(1),)))
    x = torch.randn(1, 2 * config.hidden_size)
    assert linears.apply("mtp.fc", x).equal(Linears(runner.model.matrices).apply("mtp.fc", x))
    a, b = lora.tensors()["mtp.fc"]
    config_json, _ = serialize_adapter(lora.tensors(), lora.spec, "tiny")
    bad = {
        "holds NaN or infinity": {**lora.tensors(), "mtp.fc": (a, torch.full_like(b, torch.nan))},
        "instead of": {**lora.tensors(), "mtp.fc": (a[:, 1:], b)},
        "lacks layers": {path: pair for path, pair in lora.tensors().items() if path != "mtp.fc"},
    }
    for drafts in (False, True):
        store = demo_runner(drafts=drafts)[0].adapters
        store.clear(1)
        for said, tensors in bad.items():
            with pytest.raises(AdapterRejected, match=said) as caught:
                store.stage(1, safetensors_of(tensors), config_json)
            assert caught.value.code == "invalid_adapter"
            assert 1 not in store.active_slots
