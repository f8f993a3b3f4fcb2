"""A small model learns from a bigger one that another engine serves."""

import pytest

from kiln_cli.up.options import run_dir_of
from tests.e2e.test_distillation import PROMPTS
from tests.support.bigger_demo import engine_process, make_bigger_demo
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.processes

BIG = "kiln-demo-big"
ROLLOUT = {"n": 4, "max_tokens": 12, "prompts_per_step": 4, "reasoning_effort": "none"}


@pytest.fixture(scope="module")
def teacher(stack: Stack, tmp_path_factory) -> str:
    """Announced on the stack's own Redis, and named in no setting."""
    folder = tmp_path_factory.mktemp("t")
    make_bigger_demo(folder / "model")
    redis_url = f"unix://{run_dir_of(stack.state_dir)}/redis.sock"
    with engine_process(folder, folder / "model", BIG, REDIS_URL=redis_url):
        yield BIG


def body_of(teacher, **fields):
    body = {"adapter": "apprentice", "teacher": teacher, "prompts": PROMPTS, "rollout": ROLLOUT}
    return {**body, "epochs": 8, "learning_rate": 2e-3, "seed": 5, "attach": False, **fields}


def test_a_student_comes_closer_to_a_bigger_model_on_another_engine(stack, teacher):
    unknown = stack.post("/v1/train/opd", body_of({"model": "nobody"}))
    assert (unknown.status_code, unknown.json()["error"]["code"]) in [
        (404, "teacher_not_found"),
        (503, "teacher_unavailable"),  # while the teacher is loading
    ]

    def accepted():
        response = stack.post("/v1/train/opd", body_of({"model": teacher, "top_k": 32}))
        return response if response.status_code == 202 else None

    job = stack.wait_for_job(wait_for(accepted, "the teacher to announce itself").json()["id"])
    assert job["status"] == "succeeded", job
    shown = job["effective_config"]["teacher"]
    assert (shown["model"], shown["top_k"], len(shown["sha256"])) == (BIG, 32, 64)
    distances = [step["teacher_kl"] for step in job["history"]]
    means = [sum(distances[i : i + 4]) / 4 for i in range(len(distances) - 3)]
    assert means == sorted(means, reverse=True), distances
    assert means[-1] < 0.7 * distances[0], distances
    receipt = stack.get(f"/v1/train/jobs/{job['id']}/receipt")
    assert receipt["effective_config"]["teacher"] == shown


def test_nobody_is_answered_by_the_teacher(stack, teacher):
    assert BIG not in [model["id"] for model in stack.get("/v1/models")["data"]]
    for number in range(4):
        stack.chat(f"Say {number}.", max_tokens=2).raise_for_status()
    assert len(stack.get("/health")["engines"]) == 1
