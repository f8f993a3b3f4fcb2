"""The life of training jobs around the trainer, on the whole stack."""

import pytest

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
