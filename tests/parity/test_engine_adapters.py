"""Adapters in the paged model against PEFT on transformers' Qwen3.5, float32.

Tolerance as in test_engine_paged_model: float32 sums in another order stay below 1e-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_engine.execution.adapter_store import AdapterRankTooHigh, AdapterRejected, AdapterStore
from kiln_nn.lora import serialize_adapter
from kiln_nn.lora.parameters import LoraParameters
from tests.support.engine_plans import EngineRig, relative_error, token_ids
from tests.support.lora_builders import peft_model_with, random_lora
from tests.support.tiny_models import SHAPES, hf_model, make_checkpoint

TOLERANCE = 1e-4
TOKENS = token_ids(60)
# Of different rank, and on different layers.
ADAPTERS: dict[int, dict[str, Any]] = {
    1: {"rank": 3, "seed": 5},
    2: {"rank": 8, "seed": 6, "targets": "attention"},
    3: {"rank": 1, "seed": 7, "targets": ("down_proj", "in_proj_b", "k_proj")},
}


def upload(store: AdapterStore, slot: int, lora: LoraParameters) -> None:
    config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
    store.stage(slot, adapter_bytes, config_json)
    store.activate(slot)


class Served:
    """One checkpoint with three adapters: the rig, and what PEFT says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rig = EngineRig(folder)
        self.loras = {slot: random_lora(self.rig.config, **fields) for slot, fields in ADAPTERS.items()}
        for slot, lora in self.loras.items():
            upload(self.rig.adapters, slot, lora)
        self._expected: dict[int, torch.Tensor] = {}

    def expected(self, slot: int) -> torch.Tensor:
        """PEFT's logits for TOKENS; slot 0 is the base model."""
        if slot not in self._expected:
            model = hf_model(self.folder)
            if slot:
                model = peft_model_with(self.loras[slot], model)
            with torch.no_grad():
                self._expected[slot] = model(torch.tensor([TOKENS])).logits[0]
        return self._expected[slot]


@pytest.fixture(scope="module", params=["tied", "deltanet_16_32"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp(f"adapters_{request.param}")
    make_checkpoint(folder, seed=4, **SHAPES[request.param])
    return Served(folder)


@pytest.mark.parametrize("slot", list(ADAPTERS))
def test_one_adapter_matches_peft(served: Served, slot: int):
    rig = served.rig
    sequence = rig.sequence(((slot, 1.0),))
    logits = torch.cat((rig.prefill(sequence, TOKENS[:37], [16]), rig.decode_all(sequence, TOKENS[37:])))
    assert relative_error(logits, served.expected(slot)) < TOLERANCE
    # The adapter is large enough for this to mean something.
    assert relative_error(logits, served.expected(0)) > 1e-2
    rig.free(sequence)


def test_different_adapters_in_one_batch_match_each_alone(served: Served):
    rig = served.rig
    slots = [0, 1, 2, 3, 1]
    starts = [20, 33, 16, 1, 40]
    sequences = [rig.sequence(((slot, 1.0),) if slot else ()) for slot in slots]
    results = rig.step(
        chunks=[rig.chunk(s, TOKENS[:start]) for s, start in zip(sequences, starts, strict=True)]
    )
    logits = [[result] for result in results]
    for step in range(18):
        results = rig.step(
            [
                rig.decode(sequence, TOKENS[start + step])
                for sequence, start in zip(sequences, starts, strict=True)
            ]
        )
        for parts, result in zip(logits, results, strict=True):
            parts.append(result)
    for slot, parts, sequence in zip(slots, logits, sequences, strict=True):
        actual = torch.cat(parts)
        assert relative_error(actual, served.expected(slot)[: len(actual)]) < TOLERANCE, slot
        rig.free(sequence)


def test_an_adapter_decodes_while_others_prefill(served: Served):
    rig = served.rig
    running, joining = rig.sequence(((2, 1.0),)), rig.sequence(((3, 1.0),))
    rig.prefill(running, TOKENS[:20])
    decoded, prefilled = rig.step([rig.decode(running, TOKENS[20])], [rig.chunk(joining, TOKENS[:25])])
    assert relative_error(decoded, served.expected(2)[20:21]) < TOLERANCE
    assert relative_error(prefilled, served.expected(3)[:25]) < TOLERANCE
    rig.free(running)
    rig.free(joining)


def test_adapters_of_one_row_add_up_with_their_scales(served: Served):
    """Composition is the sum of the updates: checked against the weights with the sum merged in."""
    rig = served.rig
    scales = {1: 0.7, 2: -0.4}
    model = hf_model(served.folder)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for slot, scale in scales.items():
            lora = served.loras[slot]
            for path, (a, b) in lora.tensors().items():
                parameters[path + ".weight"] += scale * lora.spec.scaling * b @ a
        expected = model(torch.tensor([TOKENS])).logits[0]
    sequence, other = rig.sequence(tuple(scales.items())), rig.sequence()
    logits, base = rig.step(chunks=[rig.chunk(sequence, TOKENS[:50]), rig.chunk(other, TOKENS[:50])])
    assert relative_error(logits, expected[:50]) < TOLERANCE
    assert relative_error(base, served.expected(0)[:50]) < TOLERANCE
    rig.free(sequence)
    rig.free(other)


def test_naming_an_adapter_twice_doubles_it(served: Served):
    rig = served.rig
    twice, doubled = rig.sequence(((1, 0.5), (1, 0.5))), rig.sequence(((1, 1.0),))
    first, second = rig.step(chunks=[rig.chunk(twice, TOKENS[:20]), rig.chunk(doubled, TOKENS[:20])])
    assert relative_error(first, second) < 1e-6
    rig.free(twice)
    rig.free(doubled)


def test_a_slot_serves_its_new_adapter_after_a_swap(served: Served):
    """Also with the old combination of slots still stacked from the step before."""
    rig = served.rig

    def logits_of(slot: int) -> torch.Tensor:
        sequence, other = rig.sequence(((slot, 1.0),)), rig.sequence(((2, 1.0),))
        result, _ = rig.step(chunks=[rig.chunk(sequence, TOKENS[:30]), rig.chunk(other, TOKENS[:10])])
        rig.free(sequence)
        rig.free(other)
        return result

    upload(rig.adapters, 4, served.loras[1])
    assert relative_error(logits_of(4), served.expected(1)[:30]) < TOLERANCE
    rig.adapters.clear(4)
    assert 4 not in rig.adapters.active_slots
    # Lower rank than before: nothing of the old one may shine through.
    upload(rig.adapters, 4, served.loras[3])
    assert relative_error(logits_of(4), served.expected(3)[:30]) < TOLERANCE
    rig.adapters.clear(4)


def test_an_overflowing_adapter_harms_only_its_own_rows(served: Served):
    rig = served.rig
    lora = random_lora(rig.config, rank=2, seed=11)
    for a, b in lora.tensors().values():
        a.fill_(3e38)
        b.fill_(3e38)
    upload(rig.adapters, 4, lora)
    bad, base, good = rig.sequence(((4, 1.0),)), rig.sequence(), rig.sequence(((1, 1.0),))
    results = rig.step(chunks=[rig.chunk(s, TOKENS[:30]) for s in (bad, base, good)])
    assert not torch.isfinite(results[0]).all()
    assert relative_error(results[1], served.expected(0)[:30]) < TOLERANCE
    assert relative_error(results[2], served.expected(1)[:30]) < TOLERANCE
    rig.adapters.clear(4)
    # Whoever gets its pages and its slot next is not harmed either.
    rig.free(bad)
    next_one = rig.sequence()
    logits = torch.cat((rig.prefill(next_one, TOKENS[:20]), rig.decode_all(next_one, TOKENS[20:])))
    assert relative_error(logits, served.expected(0)) < TOLERANCE
    for sequence in (base, good, next_one):
        rig.free(sequence)


def test_a_bad_adapter_is_refused_and_nothing_becomes_active(served: Served):
    store = served.rig.adapters
    high = random_lora(served.rig.config, rank=9)
    config_json, adapter_bytes = serialize_adapter(high.tensors(), high.spec, "tiny")
    with pytest.raises(AdapterRankTooHigh):
        store.stage(4, adapter_bytes, config_json)
    with pytest.raises(AdapterRejected) as refused:
        store.stage(4, adapter_bytes[:50], config_json)
    assert (refused.value.code, bool(refused.value.hint)) == ("invalid_adapter", True)
    with pytest.raises(AdapterRejected) as refused:
        store.stage(4, adapter_bytes, config_json.replace('"use_dora": false', '"use_dora": true'))
    assert refused.value.code == "unsupported_adapter"
    with pytest.raises(KeyError):
        store.activate(4)
    assert store.active_slots == {1, 2, 3}
