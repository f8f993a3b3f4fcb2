"""Corrections of kept completions, and jobs that learn them, over a real Redis."""

import json

import pytest
import redis.asyncio

from kiln_common.bus import keys
from kiln_gateway.settings import ApiKey
from tests.support.gateway import gateway_rig
from tests.support.redis_server import private_redis

CORRECTIONS, SFT = "/v1/corrections", "/v1/train/sft"
KEYS = tuple(ApiKey(key=f"key-{n}-0123456789", scopes=("infer", "train")) for n in ("one", "two"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def store(server):
    client = redis.asyncio.from_url(server.url, socket_timeout=1, socket_connect_timeout=1)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def rig(tmp_path, store):
    async with gateway_rig(tmp_path, redis=store) as rig:
        yield rig


async def correct(rig, completion_id, text="Better!", **options):
    return await rig.post(CORRECTIONS, {"completion_id": completion_id, "correction": text}, **options)


async def test_a_correction_is_learned_after_the_very_tokens_that_led_to_the_answer(rig, store):
    answer = (await rig.chat(return_token_ids=True)).json()
    kept = (await correct(rig, answer["id"])).json()
    assert (kept["answer"], kept["correction"], kept["status"]) == ("Hello there!", "Better!", "unused")
    response = await rig.post(SFT, {"adapter": "a", "corrections": "unused"})
    assert (response.status_code, response.json()["corrections"]) == (202, [kept["id"]])
    (example,) = rig.trainer.submitted[0].sft.examples
    prompt = answer["prompt_token_ids"]
    better = [*rig.tokenizer.encode("Better!"), rig.tokenizer.id_of("<|im_end|>")]
    assert list(example.token_ids) == prompt + better
    assert list(example.loss_weights) == [0.0] * len(prompt) + [1.0] * len(better)
    await store.hset(keys.correction(kept["id"]), "used_by", "job_1")  # as the trainer's script does
    (listed,) = (await rig.http.get(f"{CORRECTIONS}?status=used")).json()["data"]
    assert (listed["status"], listed["job"]) == ("used", "job_1")
    assert (await rig.http.get(f"{CORRECTIONS}?status=unused")).json()["data"] == []
    refused = await rig.post(SFT, {"adapter": "a", "corrections": "unused"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_unused_corrections")


async def test_the_thinking_stays_and_is_not_learned(rig):
    rig.engine.script = lambda request: "Let me see.\n</think>\n\nHello there!"
    answer = (await rig.chat(return_token_ids=True, chat_template_kwargs={"enable_thinking": True})).json()
    kept = (await correct(rig, answer["id"])).json()
    assert kept["answer"] == "Hello there!"
    await rig.post(SFT, {"adapter": "a", "corrections": [kept["id"]]})
    (example,) = rig.trainer.submitted[0].sft.examples
    learned = [i for i, w in zip(example.token_ids, example.loss_weights, strict=True) if w]
    assert rig.tokenizer.decode(learned) == "\n\nBetter!<|im_end|>"
    context = rig.tokenizer.decode(list(example.token_ids)[: -len(learned)])
    assert context.endswith("Let me see.\n</think>")
    rig.engine.script = lambda request: "I am still thinking"
    unfinished = (await rig.chat(chat_template_kwargs={"enable_thinking": True})).json()
    refused = await correct(rig, unfinished["id"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "nothing_to_correct")


async def test_corrections_go_with_other_examples(rig):
    kept = [(await correct(rig, (await rig.chat()).json()["id"], text)).json()["id"] for text in "ab"]
    body = {"adapter": "a", "examples": [{"prompt": "Hi", "completion": "Yo"}], "corrections": "unused"}
    assert (await rig.post(SFT, body)).status_code == 202
    assert len(rig.trainer.submitted[0].sft.examples) == 3
    assert list(rig.trainer.submitted[0].correction_ids) == kept  # the oldest first


async def test_a_correction_is_kept_once_a_key_and_can_be_deleted(rig):
    completion_id = (await rig.chat()).json()["id"]
    headers = {"Idempotency-Key": "k"}
    first = (await correct(rig, completion_id, headers=headers)).json()
    assert (await correct(rig, completion_id, headers=headers)).json() == first
    other = await correct(rig, completion_id, "Other", headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    deleted = await rig.http.delete(f"{CORRECTIONS}/{first['id']}")
    assert deleted.json() == {"id": first["id"], "object": "correction", "deleted": True}
    for call in (
        rig.http.delete(f"{CORRECTIONS}/{first['id']}"),
        rig.post(SFT, {"adapter": "a", "corrections": [first["id"]]}),
    ):
        gone = await call
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "correction_not_found")
    assert (await rig.http.get(CORRECTIONS)).json()["data"] == []


async def test_a_datasets_key_stands_for_its_bytes(rig):
    headers = {"Idempotency-Key": "k"}

    async def upload(completion):
        line = json.dumps({"prompt": "Hi", "completion": completion})
        return await rig.http.post("/v1/datasets", content=line, headers=headers)

    first = await upload("a")
    assert (await upload("a")).json() == first.json()
    other = await upload("b")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert len(rig.datasets.kept) == 1


async def test_what_is_not_known_or_not_ones_own_is_not_found(tmp_path, store):
    async with gateway_rig(tmp_path, redis=store, api_keys=KEYS) as rig:
        one, two = ({"Authorization": f"Bearer key-{n}-0123456789"} for n in ("one", "two"))
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        completion_id = (await rig.post("/v1/chat/completions", body, headers=one)).json()["id"]
        for headers, wanted in ((one, "cmpl_none"), (two, completion_id)):
            refused = await correct(rig, wanted, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "rollout_not_found")
        kept = (await correct(rig, completion_id, headers=one)).json()
        assert (await rig.http.get(CORRECTIONS, headers=two)).json()["data"] == []
        assert (await rig.http.delete(f"{CORRECTIONS}/{kept['id']}", headers=two)).status_code == 404


async def test_corrections_of_another_base_model_are_not_learned(rig, store):
    kept = (await correct(rig, (await rig.chat()).json()["id"])).json()["id"]
    await store.hset(keys.correction(kept), "model_hash", "0" * 64)
    for wanted, code in (("unused", "no_unused_corrections"), ([kept], "correction_not_found")):
        refused = await rig.post(SFT, {"adapter": "a", "corrections": wanted})
        assert refused.json()["error"]["code"] == code
    assert rig.trainer.submitted == []


async def test_a_list_reads_what_it_shows_and_a_job_finds_the_oldest(rig, store, monkeypatch):
    monkeypatch.setattr("kiln_gateway.corrections._STATES_PAGE", 2)
    monkeypatch.setattr("kiln_gateway.corrections._WHOLE_PAGE", 2)
    completion_id = (await rig.chat()).json()["id"]
    kept = [(await correct(rig, completion_id, text)).json()["id"] for text in "abcdefg"]
    await store.hset(keys.correction(kept[1]), "used_by", "job_1")
    await store.hset(keys.correction(kept[5]), "used_by", "job_1")

    async def listed(query):
        return [each["id"] for each in (await rig.http.get(f"{CORRECTIONS}?{query}")).json()["data"]]

    assert await listed("status=used") == [kept[5], kept[1]]
    assert await listed("status=used&limit=1") == [kept[5]]
    assert await listed("") == kept[::-1]
    # Whole ones are read as far as they are shown.
    await store.config_resetstat()
    assert await listed("limit=1") == kept[-1:]
    assert (await store.info("commandstats"))["cmdstat_hgetall"]["calls"] == 1
    monkeypatch.setattr("kiln_gateway.corrections.MAX_AT_ONCE", 3)
    await rig.post(SFT, {"adapter": "a", "corrections": "unused"})
    assert list(rig.trainer.submitted[0].correction_ids) == [kept[0], kept[2], kept[3]]
    monkeypatch.setattr("kiln_gateway.corrections._MAX_KEPT", 7)
    refused = await correct(rig, completion_id, "One more")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_corrections")


async def test_without_redis_there_are_no_corrections(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        response = await rig.http.get(CORRECTIONS)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_unavailable")
