"""Datasets: every broken line is named, nothing is kept by halves, and jobs learn from their rows."""

import json
import random

import pytest

from kiln_gateway.settings import ApiKey
from tests.support.gateway import gateway_rig

DATASETS, SFT, GRPO = "/v1/datasets", "/v1/train/sft", "/v1/train/grpo"
PAIR = {"prompt": "Hi", "completion": "Hello there!"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
GROUP = {"prompt": "Hi", "completions": [{"text": "a", "reward": 1}, {"text": "b", "reward": 0}]}
KEYS = tuple(
    ApiKey(key=f"{name}-key-0123456789", scopes=scopes)
    for name, scopes in (("one", ("train",)), ("two", ("train",)), ("admin", ("train", "admin")))
)


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        yield rig


def jsonl(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


async def upload(rig, content, query="", **options):
    return await rig.http.post(f"{DATASETS}{query}", content=content, **options)


async def test_each_of_seven_broken_lines_among_ten_thousand_is_named_and_nothing_is_kept(rig):
    rows = [{"prompt": f"Say {number}", "completion": str(number)} for number in range(10_000)]
    broken = {
        1: (b'{"prompt": "a"', "invalid_json"),
        500: ({"prompt": "a"}, "conflicting_fields"),
        501: ({"prompt": "a", "completion": 5}, "invalid_value"),
        2_000: ({"prompt": "", "completion": "b"}, "empty_prompt"),
        7_777: (CHAT, "invalid_value"),
        9_999: ({"prompt": "a", "completion": "b", "wieght": 2}, "unknown_field"),
        10_000: (b"[1, 2]", "invalid_json"),
    }
    for line, (row, _) in broken.items():
        rows[line - 1] = row

    async def chunks():  # cut anywhere, also inside a line
        content = jsonl(*rows)
        for start in range(0, len(content), 4_099):
            yield content[start : start + 4_099]

    response = await upload(rig, chunks(), "?format=prompt_completion")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_dataset")
    assert (error["details"]["num_broken"], error["details"]["num_lines"]) == (7, 10_000)
    assert {each["line"]: each["code"] for each in error["details"]["lines"]} == {
        line: code for line, (_, code) in broken.items()
    }
    assert all(f"line {line}: " in error["message"] for line in broken)
    assert "`wieght`" in error["message"]
    assert rig.datasets.kept == {}


@pytest.mark.parametrize(
    ("row", "format"), [(PAIR, "prompt_completion"), (CHAT, "chat"), (GROUP, "rollouts")]
)
async def test_the_first_row_tells_the_format(rig, row, format):
    response = await upload(rig, jsonl(row, b"", row) + json.dumps(row).encode(), "?name=mine")
    body = response.json()
    assert response.status_code == 201
    assert (body["object"], body["name"], body["format"], body["rows"]) == ("dataset", "mine", format, 3)
    again = await upload(rig, jsonl(row, b"", row) + json.dumps(row).encode(), "?name=other")
    assert (again.status_code, again.json()) == (200, body)
    assert [each["id"] for each in (await rig.http.get(DATASETS)).json()["data"]] == [body["id"]]
    assert (await rig.http.get(f"{DATASETS}/{body['id']}")).json() == body
    deleted = await rig.http.delete(f"{DATASETS}/{body['id']}")
    assert deleted.json() == {"id": body["id"], "object": "dataset", "deleted": True}
    for method in ("GET", "DELETE"):
        gone = await rig.http.request(method, f"{DATASETS}/{body['id']}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "dataset_not_found")


@pytest.mark.parametrize("rows", [(PAIR, CHAT), (CHAT, PAIR, CHAT)])
async def test_examples_of_both_forms_are_kept_and_learned_as_they_are_without_a_dataset(rig, rows):
    kept = await upload(rig, jsonl(*rows))
    assert (kept.status_code, kept.json()["format"]) == (201, "mixed")
    for data in ({"dataset": kept.json()["id"]}, {"examples": list(rows)}):
        response = await rig.post(SFT, {"adapter": "a", **data})
        assert response.status_code == 202, response.text
    from_dataset, given = rig.trainer.submitted
    assert from_dataset.sft == given.sft
    for query in ("?format=chat", "?format=prompt_completion", "?format=rollouts"):
        assert (await upload(rig, jsonl(*rows), query)).json()["error"]["code"] == "invalid_dataset"
    assert (await upload(rig, jsonl(PAIR, GROUP))).json()["error"]["code"] == "invalid_dataset"


async def test_a_form_is_an_upload_too(rig):
    form = {"files": {"file": ("letters.jsonl", jsonl(PAIR))}, "data": {"format": "prompt_completion"}}
    response = await rig.http.post(DATASETS, **form)
    assert (response.status_code, response.json()["name"]) == (201, "letters.jsonl")
    for fields, code in (({"formt": "chat"}, "unknown_field"), ({"format": "csv"}, "invalid_value")):
        refused = await rig.http.post(DATASETS, files=form["files"], data=fields)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    refused = await rig.http.post(DATASETS, files={"data": ("a", b"")}, data={})
    assert refused.status_code == 400


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_dataset"),
        (b"\n\n", "empty_dataset"),
        (b'\xff{"prompt": "a"}\n', "invalid_dataset"),
        (jsonl({"rollouts": [{"completion_id": "c", "reward": r} for r in (0, 1)]}), "invalid_dataset"),
        (b'{"prompt": "' + b"x" * (9 * 1024 * 1024) + b'", "completion": "a"}\n', "invalid_dataset"),
    ],
)
async def test_what_is_no_dataset_says_why(rig, content, code):
    response = await upload(rig, content)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert rig.datasets.kept == {}


async def test_an_upload_beyond_the_limit_is_refused(tmp_path):
    async with gateway_rig(tmp_path, max_upload_bytes=100) as rig:
        response = await upload(rig, jsonl(*[PAIR] * 10))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert rig.datasets.kept == {}


async def test_a_sample_is_drawn_by_its_seed(rig):
    rows = [{"prompt": f"Say {number}", "completion": str(number)} for number in range(50)]
    dataset = (await upload(rig, jsonl(b"", *rows))).json()["id"]

    async def sample(query):
        return (await rig.http.get(f"{DATASETS}/{dataset}/sample?{query}")).json()["data"]

    first = await sample("n=5&seed=1")
    assert first == await sample("n=5&seed=1") != await sample("n=5&seed=2")
    assert len(first) == 5
    assert all(each["row"] == rows[each["line"] - 2] for each in first)
    assert [each["row"] for each in await sample("n=1000")] == rows

    # Nothing is read after the last row that is drawn.
    fetch, sent = rig.datasets.fetch, []

    async def counted(dataset_id):
        async for chunk in fetch(dataset_id):
            sent.append(chunk)
            yield chunk

    rig.datasets.fetch, rig.datasets.chunk_bytes = counted, 64
    early = next(seed for seed in range(100) if random.Random(seed).randrange(50) < 20)
    (found,) = await sample(f"n=1&seed={early}")
    assert b"".join(sent).count(b"\n") < found["line"] + 3


async def test_sft_learns_from_a_dataset_as_from_the_same_examples(rig):
    rows = [CHAT, {**CHAT, "weight": 0.5}]
    dataset = (await upload(rig, jsonl(*rows))).json()
    named = await rig.post(SFT, {"adapter": "a", "dataset": dataset["id"]})
    given = await rig.post(SFT, {"adapter": "a", "examples": rows})
    assert (named.status_code, given.status_code) == (202, 202)
    assert rig.trainer.submitted[0].sft == rig.trainer.submitted[1].sft
    assert rig.trainer.submitted[0].dataset.sha256 == dataset["sha256"]
    assert (named.json()["dataset"], given.json()["dataset"]) == (dataset["id"], None)


async def test_grpo_learns_from_groups_that_were_uploaded(rig):
    dataset = (await upload(rig, jsonl(GROUP, {**GROUP, "prompt": "Bye"}))).json()["id"]
    response = await rig.post(GRPO, {"adapter": "a", "dataset": dataset})
    assert response.status_code == 202
    groups = rig.trainer.submitted[0].grpo.groups
    assert [[rollout.reward for rollout in group.rollouts] for group in groups] == [[1, 0], [1, 0]]


async def test_a_dataset_that_does_not_suit_the_job_is_refused(tmp_path):
    async with gateway_rig(tmp_path, max_job_dataset_bytes=400) as rig:
        pairs = (await upload(rig, jsonl(PAIR))).json()["id"]
        groups = (await upload(rig, jsonl(GROUP))).json()["id"]
        large = (await upload(rig, jsonl(*[PAIR] * 10))).json()["id"]
        only_user = {"messages": CHAT["messages"][:1]}
        mute = (await upload(rig, jsonl(CHAT, only_user))).json()["id"]
        for path, fields, status, code in (
            (SFT, {"dataset": groups}, 400, "wrong_dataset_format"),
            (GRPO, {"dataset": pairs}, 400, "wrong_dataset_format"),
            (SFT, {"dataset": large}, 413, "dataset_too_large_for_job"),
            (SFT, {"dataset": "ds_none"}, 404, "dataset_not_found"),
            (SFT, {"dataset": pairs, "examples": [PAIR]}, 400, "conflicting_fields"),
            (GRPO, {"dataset": groups, "prompt": "Hi"}, 400, "conflicting_fields"),
            (SFT, {"dataset": mute}, 400, "dataset_row_refused"),
        ):
            response = await rig.post(path, {"adapter": "a", **fields})
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert f"line 2 of {mute}" in response.json()["error"]["message"]
        assert rig.trainer.submitted == []


async def test_datasets_belong_to_their_key_and_admins_see_all(tmp_path):
    async with gateway_rig(tmp_path, api_keys=KEYS) as rig:

        def bearer(name):
            return {"Authorization": f"Bearer {name}-key-0123456789"}

        mine = (await upload(rig, jsonl(PAIR), headers=bearer("one"))).json()["id"]
        theirs = (await upload(rig, jsonl(PAIR), headers=bearer("two"))).json()["id"]
        assert mine != theirs
        for suffix in ("", "/sample"):
            hidden = await rig.http.get(f"{DATASETS}/{mine}{suffix}", headers=bearer("two"))
            assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "dataset_not_found")
        assert (await rig.http.delete(f"{DATASETS}/{mine}", headers=bearer("two"))).status_code == 404
        job = await rig.post(SFT, {"adapter": "a", "dataset": mine}, headers=bearer("two"))
        assert job.status_code == 404
        for name, ids in (("two", [theirs]), ("admin", [theirs, mine])):
            listed = (await rig.http.get(DATASETS, headers=bearer(name))).json()["data"]
            assert [each["id"] for each in listed] == ids
