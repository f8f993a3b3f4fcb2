"""The life of training jobs around the trainer, on the whole stack."""

import json

import httpx
import pytest

from tests.support.stack import wait_for

pytestmark = pytest.mark.processes

SFT = "/v1/train/sft"
EXAMPLES = [
    {"prompt": f"What is {number} and one?", "completion": f"It is {number + 1}."} for number in range(6)
]


def test_a_job_done_again_gives_the_same_bytes_and_the_same_receipt(stack):
    body = {"adapter": "receipts", "examples": EXAMPLES, "epochs": 2, "batch_tokens": 128, "seed": 11}
    body |= {"publish": 2, "attach": False, "learning_rate": 1e-3}
    first = stack.wait_for_job(stack.post(SFT, body).json()["id"])
    assert first["status"] == "succeeded", first["error"]
    assert len(first["published"]) > 1
    again = stack.wait_for_job(stack.post(f"/v1/train/jobs/{first['id']}/retry", {}).json()["id"])
    other = stack.wait_for_job(stack.post(f"/v1/train/jobs/{first['id']}/retry", {"seed": 12}).json()["id"])
    receipts = [stack.get(f"/v1/train/jobs/{job['id']}/receipt") for job in (first, again, other)]
    assert [receipt["status"] for receipt in receipts] == ["succeeded"] * 3
    hashes = [receipt["result"]["sha256"] for receipt in receipts]
    assert hashes[0] == hashes[1] != hashes[2]
    versions = [[each["sha256"] for each in receipt["published"]] for receipt in receipts]
    assert versions[0] == versions[1]
    for name in ("model", "base_adapter", "seeds", "software", "tokens", "steps"):
        assert receipts[0][name] == receipts[1][name], name
    assert receipts[0]["metrics"]["loss"] == receipts[1]["metrics"]["loss"]
    assert {receipt["data"]["sha256"] for receipt in receipts} == {receipts[0]["data"]["sha256"]}
    assert {"torch", "kiln", "python", "device"} <= receipts[0]["software"].keys()
    assert receipts[1]["retry_of"] == first["id"]
    assert len(receipts[0]["model"]["sha256"]) == 64


def test_a_dataset_and_a_correction_are_learned(stack):
    lines = "".join(json.dumps(example) + "\n" for example in EXAMPLES)
    broken = httpx.post(f"{stack.url}/v1/datasets", content=lines + '{"prompt": 1}\n', timeout=30)
    assert (broken.status_code, broken.json()["error"]["details"]["lines"][0]["line"]) == (400, 7)
    dataset = httpx.post(f"{stack.url}/v1/datasets?name=sums", content=lines, timeout=30).json()
    completion_id = stack.chat("What is two and two?", max_tokens=8).json()["id"]
    kept = stack.post("/v1/corrections", {"completion_id": completion_id, "correction": "Four."}).json()
    body = {"adapter": "learned", "dataset": dataset["id"], "corrections": "unused", "attach": False}
    job = stack.wait_for_job(stack.post(SFT, body).json()["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["metrics"]["num_examples"] == len(EXAMPLES) + 1
    receipt = stack.get(f"/v1/train/jobs/{job['id']}/receipt")
    assert receipt["data"]["dataset"] == {"id": dataset["id"], "sha256": dataset["sha256"]}
    (correction,) = [each for each in stack.get("/v1/corrections")["data"] if each["id"] == kept["id"]]
    assert (correction["status"], correction["job"]) == ("used", job["id"])
    assert stack.post(SFT, {"adapter": "learned", "corrections": "unused"}).status_code == 400
    assert httpx.delete(f"{stack.url}/v1/datasets/{dataset['id']}", timeout=30).status_code == 200


def test_a_cancelled_job_takes_back_what_it_published(stack):
    attached = [each["name"] for each in stack.get("/v1/adapters")["data"] if each["attached_version"]]
    body = {"adapter": "regretted", "examples": EXAMPLES, "epochs": 500, "batch_tokens": 64, "publish": 2}
    job_id = stack.post(SFT, body).json()["id"]
    path = f"/v1/train/jobs/{job_id}"
    wait_for(lambda: len(stack.get(path)["published"]) > 1, "two versions on the way")
    stack.post(f"{path}/cancel", {"published": "discard"})
    job = stack.wait_for_job(job_id)
    assert (job["status"], job["published"]) == ("cancelled", [])
    adapters = stack.get("/v1/adapters")["data"]
    assert "regretted" not in [each["name"] for each in adapters]
    assert [each["name"] for each in adapters if each["attached_version"]] == attached
    assert stack.chat("Hi", max_tokens=4).status_code == 200
