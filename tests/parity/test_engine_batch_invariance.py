"""With batch_invariant a request's tokens and log-probabilities have the same bits in any company.

Through settings, scheduler, loop and runner as they serve: float32 on a CPU, and on a GPU bfloat16
with graphs. Compared are Python floats, so equal means equal to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine.spine import AdapterSlots, Spine, make_settings
from kiln_engine.device_choice import SettingsContradict
from kiln_engine.domain import AdapterUse, GenerationRequest, SamplingParams
from kiln_nn.lora import serialize_adapter
from tests.support.engine_plans import token_ids
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import SHAPES, make_checkpoint

# Beside what decodes a step has room for 39 tokens: a chunk of a prompt has 32.
SIZES = {
    "max_running": 8,
    "num_state_slots": 96,
    "step_token_budget": 47,
    "max_model_len": 256,
    "kv_cache_tokens": 65_536,
    "num_adapter_slots": 3,
}
GPU_SIZES = {**SIZES, "max_running": 40, "step_token_budget": 79}
# Within what the kernels take.
GPU_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "dtype": torch.bfloat16,
}
SHAPES_TESTED = {name: SHAPES[name] for name in ("tied", "deltanet_16_16")} | {"gpu": GPU_SHAPE}
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
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


@dataclass(frozen=True)
class Model:
    """A checkpoint and where it is to run."""

    folder: Path
    device: str
    num_others: int

    def start(self, adapter_of_slot: tuple[int, ...] = (1, 2, 3), **settings: Any) -> Spine:
        sizes = {**(SIZES if self.device == "cpu" else GPU_SIZES), **settings}
        # Whatever the other tests' engines do: how many drafts share a step varies, which excludes it.
        fixed = {"batch_invariant": True, "speculation": "none"}
        spine = Spine(make_settings(self.folder, device=self.device, **fixed, **sizes))
        for slot, number in enumerate(adapter_of_slot, start=1):
            lora = random_lora(spine.config, rank=1 + number, seed=number)
            config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
            spine.upload_adapter(slot, adapter_bytes, config_json)
        return spine


@pytest.fixture(scope="module", params=["tied", "deltanet_16_16", pytest.param("gpu", marks=on_gpu)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp(f"invariant_{request.param}")
    make_checkpoint(path, seed=8, **SHAPES_TESTED[request.param])
    return Model(path, "cuda", 40) if request.param == "gpu" else Model(path, "cpu", 9)


@pytest.fixture
def spine(model: Model) -> Iterator[Spine]:
    with model.start() as spine:
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


def in_company(spine: Spine, num_others: int, seed: int, salt: str) -> dict[str, Any]:
    traffic = Traffic(salt)
    requests = [traffic.observed(kind) for kind in range(len(SAMPLING))]
    requests += [traffic.other(100 * seed + number) for number in range(num_others)]
    random.Random(seed).shuffle(requests)
    answers = rows_of(spine, requests)
    return {name: rows for name, rows in answers.items() if name.startswith("it")}


def test_answers_have_the_same_bits_alone_and_in_company_in_any_order(model: Model, spine: Spine):
    expected = alone(spine)
    for seed in (1, 2):
        assert in_company(spine, model.num_others, seed, salt=f"company {seed}") == expected


def test_answers_that_start_from_cached_chunks_have_the_same_bits(model: Model):
    with model.start(num_state_slots=256) as spine:
        expected = alone(spine)
        before = spine.stats.num_cached_tokens
        assert in_company(spine, model.num_others, 3, salt="alone") == expected
        assert alone(spine) == expected
        # Whole chunks that leave a token to compute, of prompts of 33, 1, 90, 64 and 40.
        assert spine.stats.num_cached_tokens - before == 2 * (32 + 0 + 64 + 32 + 32)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_answers_that_gave_way_have_the_same_bits(model: Model, run_ahead: int):
    """Pages for about two of the five answers: the others give way, some of them while they come back."""

    def requests(salt: str) -> list[tuple[GenerationRequest, AdapterSlots]]:
        traffic, drawn = Traffic(salt), {"max_tokens": 60, "min_tokens": 60}
        kinds = zip(SAMPLING, PROMPT_LENGTHS, ADAPTERS, strict=True)
        return [
            (traffic.request(f"it{n}", token_ids(length, seed=n), slots, seed=n, **{**kind, **drawn}), slots)
            for n, (kind, length, slots) in enumerate(kinds)
        ]

    with model.start(kv_cache_tokens=192, run_ahead=run_ahead) as spine:
        expected: dict[str, Any] = {}
        for request in requests("alone"):
            expected |= rows_of(spine, [request])
        assert spine.stats.num_preemptions == 0
        assert rows_of(spine, requests("crowd")) == expected
        assert spine.stats.num_preemptions >= 3


def test_where_adapters_lie_changes_no_bit(model: Model, spine: Spine):
    """Three adapters of one request are added in the same order whatever slots they are in."""
    traffic = Traffic("slots")
    request, slots = traffic.observed(3)
    with model.start(adapter_of_slot=(3, 1, 2)) as moved:
        elsewhere = tuple((slot % 3 + 1, scale) for slot, scale in slots)
        assert rows_of(moved, [(request, elsewhere)]) == rows_of(spine, [(request, slots)])


def test_a_step_that_holds_no_chunk_beside_its_rows_is_refused(model: Model):
    with pytest.raises(SettingsContradict, match="one fixed chunk of prefill need"):
        model.start(step_token_budget=23)
