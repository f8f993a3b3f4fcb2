"""What text completions tell of their prompts, embeddings, and batches, with a scripted engine behind them."""

import base64
import math
import struct

import pytest

from kiln_common.errors import EngineUnavailable
from tests.support.gateway import gateway_rig

TEXT, EMBED, BATCH = "/v1/completions", "/v1/embeddings", "/v1/completions/batch"


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        yield rig


def user(text):
    return [{"role": "user", "content": text}]


async def test_all_four_forms_of_a_prompt_reach_the_engine_as_tokens(rig):
    ids = rig.tokenizer.encode("What is the answer?")
    for prompt, expected in (
        ("What is the answer?", [ids]),
        (["What is the answer?", "Hi"], [ids, rig.tokenizer.encode("Hi")]),
        (ids, [ids]),
        ([ids, [5, 6]], [ids, [5, 6]]),
    ):
        rig.engine.requests.clear()
        response = await rig.post(TEXT, {"prompt": prompt, "max_tokens": 3})
        assert [list(request.prompt_token_ids) for request in rig.engine.requests] == expected
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(expected)))
        assert not any(request.HasField("num_prompt_logprobs") for request in rig.engine.requests)


async def test_echo_with_logprobs_tells_of_prompt_and_completion(rig):
    response = await rig.post(TEXT, {"prompt": "What is it?", "echo": True, "logprobs": 2})
    (choice,) = response.json()["choices"]
    assert choice["text"] == "What is it?Hello there!"
    assert rig.engine.requests[0].num_prompt_logprobs == 2
    prompt = rig.tokenizer.encode("What is it?")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][: len(prompt)] == [rig.tokenizer.decode([i]) for i in prompt]
    assert logprobs["token_logprobs"][: len(prompt)] == [
        None,
        *(rig.engine.logprob_of(position) for position in range(1, len(prompt))),
    ]
    assert logprobs["token_logprobs"][len(prompt)] == rig.engine.logprob_of(0)
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"][1]) == 3
    starts = logprobs["text_offset"]
    pieces = [choice["text"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert [piece for piece in pieces if piece] == [t for t in logprobs["tokens"] if t != "<|im_end|>"]
    assert len({len(values) for values in logprobs.values()}) == 1


@pytest.mark.parametrize("num_top", [0, 1, 2])
async def test_top_logprobs_of_a_text_hold_the_token_itself(rig, num_top):
    rig.engine.script = lambda request: [1, 70, 71, 72, rig.engine.end_id]
    body = {"prompt": [[75, 76, 77]], "echo": True, "logprobs": num_top}
    logprobs = (await rig.post(TEXT, body)).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] is None
    rows = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
    assert len(rows) == 3 + 5
    for token, logprob, top in rows[1:]:
        assert top[token] == logprob
        is_among_the_top = token == rig.tokenizer.decode([1]) and num_top == 2
        assert len(top) == num_top + (not is_among_the_top)


async def test_a_stream_tells_the_same_as_the_whole(rig):
    body = {
        "prompt": ["What is it?", "Hi"],
        "echo": True,
        "logprobs": 1,
        "prompt_logprobs": 3,
        "max_tokens": 4,
    }
    whole = (await rig.post(TEXT, body)).json()["choices"]
    streamed = [{"text": "", "logprobs": {}} for _ in whole]
    for event in (await rig.stream(TEXT, body))[:-1]:
        for choice in event["choices"]:
            into = streamed[choice["index"]]
            into["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                into["logprobs"].setdefault(name, []).extend(values)
            if "prompt_logprobs" in choice:
                into["prompt_logprobs"] = choice["prompt_logprobs"]
    for into, choice in zip(streamed, whole, strict=True):
        assert into == {name: choice[name] for name in into}


async def test_a_prompt_alone_is_scored_with_any_adapter(rig):
    rig.registry.add("helpful")
    body = {"prompt": "What is it?", "max_tokens": 0, "prompt_logprobs": 2, "adapter": "helpful"}
    response = await rig.post(TEXT, body)
    answer = response.json()
    assert response.headers["X-Kiln-Adapter"] == "helpful@1"
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    request = rig.engine.requests[0]
    assert (request.sampling.max_tokens, request.num_prompt_logprobs) == (0, 2)
    assert [ref.name for ref in request.adapters] == ["helpful"]
    prompt = list(request.prompt_token_ids)
    assert choice["prompt_logprobs"][0] is None
    for token_id, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True):
        assert entry[str(token_id)]["decoded_token"] == rig.tokenizer.decode([token_id])
        assert {"0", "1"} <= entry.keys()
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 0,
        "total_tokens": len(prompt),
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_scoring_the_way_evaluation_harnesses_ask(rig):
    """echo, logprobs and no new token: the log-likelihood of a text."""
    response = await rig.post(TEXT, {"prompt": [[5, 6, 7]], "max_tokens": 0, "echo": True, "logprobs": 1})
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, rig.engine.logprob_of(1), rig.engine.logprob_of(2)]


async def test_embeddings_come_in_order_for_all_four_forms(rig):
    ids = rig.tokenizer.encode("What is it?")
    for given, prompts in (
        ("What is it?", [ids]),
        (["What is it?", "Hi"], [ids, rig.tokenizer.encode("Hi")]),
        (ids, [ids]),
        ([ids, [5, 6]], [ids, [5, 6]]),
    ):
        rig.engine.requests.clear()
        answer = (await rig.post(EMBED, {"model": "base", "input": given})).json()
        assert [entry["index"] for entry in answer["data"]] == list(range(len(prompts)))
        for entry, prompt in zip(answer["data"], prompts, strict=True):
            assert entry["embedding"] == pytest.approx(rig.engine.embedding_of(prompt), abs=1e-6)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
        assert all(r.wants_embedding and r.sampling.max_tokens == 0 for r in rig.engine.requests)


async def test_embeddings_in_base64_are_the_same_numbers(rig):
    as_floats = (await rig.post(EMBED, {"input": "Hi"})).json()["data"][0]["embedding"]
    encoded = (await rig.post(EMBED, {"input": "Hi", "encoding_format": "base64"})).json()["data"][0]
    raw = base64.b64decode(encoded["embedding"])
    assert list(struct.unpack(f"<{len(as_floats)}f", raw)) == as_floats


async def test_fewer_dimensions_are_the_first_ones_at_length_one(rig):
    whole = (await rig.post(EMBED, {"input": "Hi"})).json()["data"][0]["embedding"]
    short = (await rig.post(EMBED, {"input": "Hi", "dimensions": 2})).json()["data"][0]["embedding"]
    length = math.hypot(*whole[:2])
    assert short == pytest.approx([value / length for value in whole[:2]])
    response = await rig.post(EMBED, {"input": "Hi", "dimensions": 5})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "dimensions")


async def test_an_adapter_answers_for_embeddings_too(rig):
    rig.registry.add("helpful", attach=True)
    for fields, label in (({}, "helpful@1"), ({"model": "base"}, "base"), ({"adapter": None}, "base")):
        response = await rig.post(EMBED, {"input": "Hi", **fields})
        assert response.headers["X-Kiln-Adapter"] == label


async def test_an_engine_that_goes_away_ends_every_embedding_and_every_answer_of_a_batch(rig):
    rig.engine.fail_after = 1
    rig.engine.failure = EngineUnavailable("the engine went away")
    for path, body in ((EMBED, {"input": ["Hi", "Ho"]}), (BATCH, {"prompts": [user("Hi"), user("Ho")]})):
        response = await rig.post(path, body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_a_batch_answers_every_prompt_with_its_own_adapter(rig):
    rig.registry.add("helpful")
    prompts = [
        user("Hi"),
        {"messages": user("Ho"), "adapter": "helpful"},
        {"messages": user("Hu"), "adapter": None},
    ]
    response = await rig.post(
        BATCH, {"prompts": prompts, "n": 2, "seed": 10, "model": "base", "max_tokens": 20}
    )
    answer = response.json()
    assert answer["object"] == "completion.batch"
    assert [entry["prompt_index"] for entry in answer["data"]] == [0, 1, 2]
    assert [entry["kiln"]["adapter"] for entry in answer["data"]] == ["base", "helpful@1", "base"]
    assert response.headers["X-Kiln-Adapter"] == "base, helpful@1"
    assert [request.sampling.seed for request in rig.engine.requests] == [10, 11, 12, 13, 14, 15]
    for entry in answer["data"]:
        assert entry["id"].startswith("chatcmpl_")
        assert entry["prompt_token_ids"]
        assert [choice["message"]["content"] for choice in entry["choices"]] == ["Hello there!"] * 2
        for choice in entry["choices"]:
            assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 5
    assert answer["usage"]["completion_tokens"] == 30


async def test_a_streamed_batch_says_the_same(rig):
    body = {"prompts": [user("Hi"), user("Ho")], "n": 2}
    whole = (await rig.post(BATCH, body)).json()
    events = await rig.stream(BATCH, body)
    assert events[-1] == "[DONE]"
    texts, usages = {}, {}
    for event in events[:-1]:
        for choice in event["choices"]:
            place = (event["prompt_index"], choice["index"])
            texts[place] = texts.get(place, "") + (choice["delta"].get("content") or "")
        if event.get("usage"):
            usages[event["prompt_index"]] = event["usage"]
    assert texts == {(i, j): "Hello there!" for i in range(2) for j in range(2)}
    assert usages == {entry["prompt_index"]: entry["usage"] for entry in whole["data"]}
