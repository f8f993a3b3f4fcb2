"""Prompt log-probabilities and embeddings against transformers' Qwen3.5, float32.

Log-probabilities within 1e-3 and embeddings within 1e-4, as other quantities of the same pass: what
differs is the order of float32 sums.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_engine.domain import (
    AdapterUse,
    BatchPlan,
    GenerationRequest,
    Readout,
    ReadoutResult,
    SamplingParams,
    SequenceEvent,
)
from kiln_nn.lora import serialize_adapter
from tests.parity.test_engine_devices import small_runner
from tests.parity.test_engine_scheduled import ScheduledEngine
from tests.support.engine_plans import EngineRig, token_ids
from tests.support.engine_serving import KERNEL_SHAPE as FIT_FOR_KERNELS
from tests.support.lora_builders import peft_model_with, random_lora
from tests.support.tiny_models import SHAPES, hf_model, make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readouts")
    make_checkpoint(folder, seed=6, **SHAPES["tied"])
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return hf_model(folder)


def ask(
    engine: ScheduledEngine, *requests: GenerationRequest, slot: int = 0
) -> dict[str, list[SequenceEvent]]:
    """Every event of the requests, run together with what else the engine has to do."""
    for request in requests:
        engine.scheduler.add(request, ((slot, 1.0),) if slot else ())
    events = defaultdict(list)
    while engine.scheduler.has_work:
        plan = engine.scheduler.plan(0.0)
        for event in engine.scheduler.commit(plan, engine.runner.launch(plan).wait()):
            events[event.request_id].append(event)
    return events


def request(
    name: str, prompt: list[int], slot: int = 0, max_tokens: int = 0, **fields: Any
) -> GenerationRequest:
    uses = (AdapterUse(f"sha-{slot}"),) if slot else ()
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerationRequest(name, tuple(prompt), params, adapters=uses, **fields)


def check_logprobs(events: list[SequenceEvent], prompt: list[int], model: Any, num_top: int) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    told = [event.readout for event in events if event.readout]
    logprobs = [logprob for readout in told for logprob in readout.logprobs]
    targets = torch.tensor(prompt[1:])[:, None]
    assert logprobs == pytest.approx(expected.gather(1, targets)[:, 0].tolist(), abs=1e-3)
    tops = [top for readout in told for top in readout.top.rows()]
    best = expected.topk(num_top)
    assert [[logprob for _, logprob in top] for top in tops] == [
        pytest.approx(line, abs=1e-3) for line in best.values.tolist()
    ]
    assert [[token_id for token_id, _ in top] for top in tops] == best.indices.tolist()


def test_prompt_logprobs_match_over_chunks_and_beside_decoding_rows(folder: Path, oracle: Any):
    engine = ScheduledEngine(folder, budget=32)  # the head takes six tokens at a time
    prompts = {f"p{length}": token_ids(length, seed=length) for length in (2, 16, 33, 90)}
    engine.add("company", token_ids(20, seed=1), max_tokens=30)
    asked = [
        request(name, prompt, num_prompt_logprobs=3, max_tokens=index)
        for index, (name, prompt) in enumerate(prompts.items())
    ]
    events = ask(engine, *asked)
    for index, (name, prompt) in enumerate(prompts.items()):
        check_logprobs(events[name], prompt, oracle, num_top=3)
        drawn = [event.row.token_id for event in events[name] if event.row]
        assert len(drawn) == index


def test_prompt_logprobs_match_with_an_adapter(folder: Path):
    engine = ScheduledEngine(folder)
    lora = random_lora(engine.runner.config, rank=4, seed=3)
    config_json, adapter_bytes = serialize_adapter(lora.tensors(), lora.spec, "tiny")
    engine.runner.adapters.stage(1, adapter_bytes, config_json)
    engine.runner.adapters.activate(1)
    model = peft_model_with(lora, hf_model(folder))
    prompt = token_ids(70, seed=9)
    events = ask(engine, request("r", prompt, slot=1, num_prompt_logprobs=2), slot=1)
    check_logprobs(events["r"], prompt, model, num_top=2)
    plain = ask(engine, request("plain", prompt, num_prompt_logprobs=2))
    with pytest.raises(AssertionError):  # and the adapter matters
        check_logprobs(plain["plain"], prompt, model, num_top=2)


def test_embeddings_match_the_last_hidden_state(folder: Path, oracle: Any):
    engine = ScheduledEngine(folder)
    prompts = {f"e{length}": token_ids(length, seed=length) for length in (1, 15, 16, 17, 100)}
    events = ask(engine, *(request(name, prompt, wants_embedding=True) for name, prompt in prompts.items()))
    for name, prompt in prompts.items():
        with torch.no_grad():
            hidden = oracle.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        embedding = torch.tensor(events[name][-1].readout.embedding)
        expected = torch.nn.functional.normalize(hidden, dim=-1)
        assert float((embedding - expected).norm()) < 1e-4
        assert float(embedding.norm()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_captured", [False, True])
def test_a_gpu_reads_out_what_the_cpu_does(tmp_path: Path, is_captured: bool):
    prompt = token_ids(75)
    make_checkpoint(tmp_path, seed=6, **(FIT_FOR_KERNELS if is_captured else SHAPES["tied"]))

    def read_out(device: str) -> ReadoutResult:
        rig = EngineRig(tmp_path, device=device)
        runner = small_runner(rig, torch.float32)
        if is_captured and device == "cuda":
            runner.capture()
        rig._slots, rig._pages = list(range(4)), list(range(32))
        wanted = Readout(first=0, target_ids=tuple(prompt[1:]), num_top_logprobs=4, wants_embedding=True)
        chunk = dataclasses.replace(rig.chunk(rig.sequence(), prompt, sampling=None), readout=wanted)
        return runner.launch(BatchPlan(1, prefill_chunks=(chunk,))).wait().readouts[0]

    expected, actual = read_out("cpu"), read_out("cuda")
    assert actual.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert actual.embedding == pytest.approx(expected.embedding, abs=1e-4)
    for ours, theirs in zip(expected.top.rows(), actual.top.rows(), strict=True):
        assert [token_id for token_id, _ in theirs] == [token_id for token_id, _ in ours]
