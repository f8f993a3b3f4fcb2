"""A gate in a whole stack: the trainer asks, the registry keeps, the gateway evaluates, engines answer."""

import pytest

from tests.support.stack import wait_for

pytestmark = pytest.mark.processes

EXAMPLES = [{"prompt": "Write a short, friendly email reply.", "completion": "Thank you! Kind regards."}]


def train(stack, adapter, target, min_score):
    """An SFT job that is published if its answer contains `target`."""
    scorer = {"type": "contains", "target": target, "ignore_case": True}
    cases = [{"prompt": "Write a short, friendly email reply.", "scorer": scorer}]
    suite = stack.post("/v1/evals/suites", {"name": adapter, "cases": cases})
    assert suite.status_code == 201, suite.text
    gate = {"suite": adapter, "min_score": min_score, "sampling": {"max_tokens": 32}}
    job = stack.post("/v1/train/sft", {"adapter": adapter, "examples": EXAMPLES, "epochs": 1, "gate": gate})
    assert job.status_code == 202, job.text
    return stack.wait_for_job(job.json()["id"])


def answering(stack):
    return stack.chat("Hello", max_tokens=1).headers["X-Kiln-Adapter"]


def test_a_gate_decides_what_is_published(stack):
    before = answering(stack)
    job = train(stack, "gated", "a text that the model does not write", 1.0)
    assert job["status"] == "succeeded", job
    outcome = job["result"]["gate"]
    assert (outcome["passed"], outcome["score"]) == (False, 0.0), outcome
    assert outcome["reason"] == "the score 0 is below the least of 1"
    assert answering(stack) == before
    assert stack.chat("Hello", model="gated", max_tokens=1).status_code == 404
    # What was kept can be looked at by its own name.
    kept = f"{job['result']['adapter']}@{job['result']['version']}"
    assert stack.chat("Hello", model=kept, max_tokens=1).headers["X-Kiln-Adapter"] == kept
    run = stack.get(f"/v1/evals/runs/{outcome['run']}?cases=true")
    assert (run["status"], run["adapter"], run["job_id"]) == ("succeeded", kept, job["id"])

    job = train(stack, "gated", ["e", "a"], 0.5)
    assert (job["result"]["adapter"], job["result"]["version"]) == ("gated", 1), job
    assert (job["result"]["gate"]["passed"], job["result"]["gate"]["score"]) == (True, 1.0)
    assert answering(stack) == "gated@1"
    assert job["id"] not in {adapter["name"] for adapter in stack.get("/v1/adapters")["data"]}


def test_a_run_outlives_the_gateway_that_began_it(stack):
    """Killed in the middle; the next gateway answers what is left once the lease is over."""
    cases = [
        {"prompt": f"What is {n} plus {n}?", "scorer": {"type": "numeric", "target": 2 * n}}
        for n in range(120)
    ]
    assert stack.post("/v1/evals/suites", {"name": "sums", "cases": cases}).status_code == 201
    body = {"suite": "sums", "adapter": None, "sampling": {"max_tokens": 24}}
    run_id = stack.post("/v1/evals/runs", body).json()["id"]
    path = f"/v1/evals/runs/{run_id}"
    wait_for(lambda: stack.get(path)["progress"]["done"] > 0, "the first results")
    assert stack.get(path)["status"] == "running"
    dead = stack.kill("gateway")
    stack.wait_for_restart("gateway", dead)
    stack.wait_until_ready()

    def ended():
        run = stack.get(path)
        return run if run["status"] in ("succeeded", "failed") else None

    run = wait_for(ended, "the run to end", 90)
    assert (run["status"], run["progress"]) == ("succeeded", {"done": 120, "cases": 120}), run
    assert 0 <= run["score"]["low"] <= run["score"]["mean"] <= run["score"]["high"] <= 1
