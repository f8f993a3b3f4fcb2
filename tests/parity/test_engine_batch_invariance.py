"""With batch_invariant a request's tokens and log-probabilities have the same bits in any company.

Through settings, scheduler, loop and runner as they serve, float32 on a CPU. Compared are Python
floats, so equal means equal to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine.spine import AdapterSlots, Spine, make_settings
from kiln_engine.device_side import SettingsContradict, load_device_side
from kiln_engine.domain import AdapterUse, GenerationRequest, SamplingParams
from kiln_nn.lora import serialize_adapter
from tests.support.engine_plans import token_ids
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import SHAPES, make_checkpoint

# With 8 running sequences a chunk of a prompt has 32 tokens.
SIZES = {
    "max_running": 8,
    "num_state_slots": 64,
    "step_token_budget": 47,
    "max_model_len": 256,
    "num_adapter_slots": 3,
}
NUM_TOKENS = 20
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.9, "num_top_logprobs": 3},
    {"top_k": 20, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"min_p": 0.05, "logit_bias": {5: 2.0}, "stop_token_ids": frozenset({7}), "min_tokens": NUM_TOKENS},
]
PROMPT_LENGTHS = [33, 1, 90, 64, 40]
ADAPTERS: list[AdapterSlots] = [(), (), ((1, 1.0),), ((1, 0.5), (2, 1.0), (3, 1.0)), ((2, 1.0),)]


@pytest.fixture(scope="module", params=["tied", "deltanet_16_16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"invariant_{request.param}")
    make_checkpoint(path, seed=8, **SHAPES[request.param])
    return path


def start(folder: Path, adapter_of_slot: tuple[int, ...] = (1, 2, 3), **settings: Any) -> Spine:
    spine = Spine(make_settings(folder, device="cpu", batch_invariant=True, **{**SIZES, **settings}))
    for slot, number in enumerate(adapter_of_slot, start=1):
        lora = random_lora(spine.config, rank=1 + number, seed=number)
        config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
        spine.upload_adapter(slot, adapter_bytes, config_json)
    return spine


@pytest.fixture
def spine(folder: Path) -> Iterator[Spine]:
    with start(folder) as spine:
        yield spine


class Traffic:
    """The requests that are looked at, one of each kind, and others around them."""

    def __init__(self, salt: str) -> None:
        self._salt = salt

    def request(
        self, name: str, prompt: list[int], slots: AdapterSlots, **sampling: Any
    ) -> GenerationRequest:
        params = SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True, **sampling})
        uses = tuple(AdapterUse(f"sha-{slot}", scale) for slot, scale in slots)
        return GenerationRequest(
            f"{self._salt} {name}", tuple(prompt), params, adapters=uses, cache_salt=self._salt
        )

    def observed(self, kind: int) -> tuple[GenerationRequest, AdapterSlots]:
        prompt, slots = token_ids(PROMPT_LENGTHS[kind], seed=100 + kind), ADAPTERS[kind]
        return self.request(f"it{kind}", prompt, slots, seed=kind, **SAMPLING[kind]), slots

    def other(self, number: int) -> tuple[GenerationRequest, AdapterSlots]:
        source = random.Random(number)
        slots = source.choice(ADAPTERS)
        sampling = {**source.choice(SAMPLING), "max_tokens": source.randint(1, NUM_TOKENS)}
        sampling.pop("min_tokens", None)
        sampling.pop("stop_token_ids", None)
        prompt = token_ids(source.randint(1, 80), seed=200 + number)
        return self.request(f"other{number}", prompt, slots, seed=number, **sampling), slots


def rows_of(spine: Spine, requests: list[tuple[GenerationRequest, AdapterSlots]]) -> dict[str, list[tuple]]:
    """What each request drew, by its name without the salt; sequence ids are not compared."""
    recording = spine.run([request for request, _ in requests], [slots for _, slots in requests])
    return {
        request_id.split()[-1]: [
            (event.row.token_id, event.row.logprob, event.row.sampled_logprob, event.row.top_logprobs)
            for event in events
            if event.row
        ]
        for request_id, events in recording.tokens_by_request().items()
    }


def alone(spine: Spine, salt: str = "alone") -> dict[str, Any]:
    traffic = Traffic(salt)
    answers = {}
    for kind in range(len(SAMPLING)):
        answers |= rows_of(spine, [traffic.observed(kind)])
    assert all(len(rows) == NUM_TOKENS for rows in answers.values())
    assert len({tuple(row[0] for row in rows) for rows in answers.values()}) == len(answers)
    return answers


def in_company(spine: Spine, seed: int, salt: str) -> dict[str, Any]:
    traffic = Traffic(salt)
    requests = [traffic.observed(kind) for kind in range(len(SAMPLING))]
    requests += [traffic.other(number) for number in range(10 * seed, 10 * seed + 9)]
    random.Random(seed).shuffle(requests)
    answers = rows_of(spine, requests)
    return {name: rows for name, rows in answers.items() if name.startswith("it")}


def test_answers_have_the_same_bits_alone_and_in_company_in_any_order(spine: Spine):
    expected = alone(spine)
    for seed in (1, 2):
        assert in_company(spine, seed, salt=f"company {seed}") == expected


def test_answers_that_start_from_cached_chunks_have_the_same_bits(spine: Spine):
    expected = alone(spine)
    before = spine.stats.num_cached_tokens
    assert in_company(spine, 3, salt="alone") == expected
    assert alone(spine) == expected
    # Each time 32 tokens of the prompts of 33, 64 and 40 (whole chunks, one token left), 64 of 90.
    assert spine.stats.num_cached_tokens - before == 2 * (32 + 64 + 32 + 32)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_answers_that_gave_way_have_the_same_bits(folder: Path, run_ahead: int):
    """Pages for about two of the five answers: the others give way, some of them while they come back."""

    def requests(salt: str) -> list[tuple[GenerationRequest, AdapterSlots]]:
        traffic, drawn = Traffic(salt), {"max_tokens": 60, "min_tokens": 60}
        kinds = zip(SAMPLING, PROMPT_LENGTHS, ADAPTERS, strict=True)
        return [
            (traffic.request(f"it{n}", token_ids(length, seed=n), slots, seed=n, **{**kind, **drawn}), slots)
            for n, (kind, length, slots) in enumerate(kinds)
        ]

    with start(folder, kv_cache_tokens=192, run_ahead=run_ahead) as spine:
        expected: dict[str, Any] = {}
        for request in requests("alone"):
            expected |= rows_of(spine, [request])
        assert spine.stats.num_preemptions == 0
        assert rows_of(spine, requests("crowd")) == expected
        assert spine.stats.num_preemptions >= 3


def test_where_adapters_lie_changes_no_bit(folder: Path, spine: Spine):
    """Three adapters of one request are added in the same order whatever slots they are in."""
    traffic = Traffic("slots")
    request, slots = traffic.observed(3)
    with start(folder, adapter_of_slot=(3, 1, 2)) as moved:
        elsewhere = tuple((slot % 3 + 1, scale) for slot, scale in slots)
        assert rows_of(moved, [(request, elsewhere)]) == rows_of(spine, [(request, slots)])


def test_a_step_that_holds_no_chunk_beside_its_rows_is_refused(folder: Path):
    wrong = {**SIZES, "step_token_budget": 20, "batch_invariant": True}
    with pytest.raises(SettingsContradict, match="one fixed chunk of prefill need 24"):
        load_device_side(make_settings(folder, device="cpu", **wrong))
