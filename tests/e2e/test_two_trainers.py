"""`kiln up --engines 2 --trainers 2`: each trainer learns from its own engine's weights, at the same time."""

import pytest

from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    options = ("--engines", "2", "--trainers", "2")
    env = {"KILN_TRAINER_CLAIM_TIMEOUT_S": "2"}
    with Stack(tmp_path_factory.mktemp("trainers"), *options, env=env) as running:
        yield running


def submit(stack, adapter, epochs):
    examples = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(1, 5)]
    body = {
        "adapter": adapter, "base_adapter": None, "examples": examples, "epochs": epochs, "attach": False,
        "checkpoint_every": 2, "lora": {"rank": 4, "alpha": 8}, "seed": sum(adapter.encode()),
    }  # fmt: skip
    response = stack.post("/v1/train/sft", body)
    assert response.status_code == 202, response.text
    return response.json()["id"]


def working(stack):
    """The engines whose weights are being learned from."""
    trainers = stack.get("/v1/train/status")["trainers"]
    return {trainer["engine_boot_id"] for trainer in trainers if trainer["status"] == "running"}


def test_two_jobs_run_at_once_each_beside_another_engine(stack):
    job_ids = [submit(stack, name, epochs=15) for name in ("left", "right")]
    boots = wait_for(lambda: found if len(found := working(stack)) == 2 else None, "two jobs at once")
    engines = stack.get("/health")["engines"]
    assert boots == {engine["boot_id"] for engine in engines}
    for job_id in job_ids:
        job = stack.wait_for_job(job_id)
        assert (job["status"], job["result"]["not_live"]) == ("succeeded", []), job
    for engine in stack.get("/health")["engines"]:
        assert {"left@1", "right@1"} <= set(engine["resident_adapters"])


def test_training_goes_on_with_one_of_them_killed(stack):
    job_ids = [submit(stack, name, epochs=15) for name in ("one", "two")]
    wait_for(lambda: len(working(stack)) == 2, "two jobs at once")
    dead = stack.kill("trainer")
    # At once, while the gateway still knows the dead one as the one that answers.
    job_ids.append(submit(stack, "three", epochs=2))
    jobs = [stack.wait_for_job(job_id) for job_id in job_ids]
    assert [job["status"] for job in jobs] == ["succeeded"] * 3, jobs
    assert sorted(job["attempts"] for job in jobs) == [1, 1, 2]
    stack.wait_for_restart("trainer", dead)
    wait_for(lambda: len(stack.get("/v1/train/status")["trainers"]) == 2, "both trainers")
