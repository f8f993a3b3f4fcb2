"""Distillation as a user runs it: a teacher is trained, a pupil learns from it, and answers."""

from typing import Any

import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.processes

PROMPTS = [
    f"Write a short email reply to {name} about the spare key." for name in ("Tom", "Ben", "Anna", "Omar")
]
ANSWER = "Ahoy there, matey! The key lies under the old oak tree."


@pytest.fixture(scope="module")
def teacher(stack: Stack) -> str:
    """An adapter that answers every prompt in one way."""
    body = {
        "adapter": "pirate",
        "examples": [{"prompt": prompt, "completion": ANSWER} for prompt in PROMPTS],
        "epochs": 8,
        "learning_rate": 3e-3,
        "attach": False,
    }
    job = stack.wait_for_job(stack.post("/v1/train/sft", body).json()["id"])
    assert job["status"] == "succeeded", job
    return "pirate"


def distil(stack: Stack, adapter: str, **fields: Any) -> str:
    body = {
        "adapter": adapter,
        "teacher": "pirate",
        "prompts": PROMPTS,
        # The pupil would hardly ever write what its teacher does: reverse_kl has little to go by.
        "divergence": "forward_kl",
        # The prompts that the teacher learned end with an empty thinking block.
        "rollout": {"n": 4, "max_tokens": 12, "prompts_per_step": 4, "reasoning_effort": "none"},
        "epochs": 8,
        "learning_rate": 2e-3,
        "seed": 5,
        "attach": False,
        **fields,
    }
    response = stack.post("/v1/train/opd", body)
    assert response.status_code == 202, response.text
    return response.json()["id"]


def adapters(stack: Stack) -> dict[str, list[int]]:
    """The versions of every adapter there is."""
    listed = stack.get("/v1/adapters")["data"]
    return {entry["name"]: [version["version"] for version in entry["versions"]] for entry in listed}


def test_a_pupil_comes_closer_to_its_teacher_round_by_round(stack, teacher):
    job = stack.wait_for_job(distil(stack, "pupil"))
    assert job["status"] == "succeeded", job
    assert job["effective_config"]["teacher"] == "pirate@1"
    distances = [step["loss"] for step in job["history"]]
    means = [sum(distances[i : i + 4]) / 4 for i in range(len(distances) - 3)]
    assert means == sorted(means, reverse=True), distances
    assert means[-1] < 0.5 * distances[0]
    # The other direction, on what each round drew: told as well, and not what this divergence brings down.
    assert min(step["teacher_kl"] for step in job["history"]) > 0
    assert [step["round"] for step in job["history"]] == list(range(1, 9))
    # Each round was drawn by the adapter as it then was: engine and trainer agree on its probabilities.
    assert max(step["sampler_trainer_kl"] for step in job["history"]) < 1e-5
    # The unfinished pupils are gone, and the finished one answers.
    found = adapters(stack)
    assert found["pupil"] == [1]
    assert job["id"] not in found
    assert job["result"]["not_live"] == []
    answer = stack.chat(PROMPTS[0], model="pupil", max_tokens=4)
    assert answer.headers["X-Kiln-Adapter"] == "pupil@1"


def test_kept_completions_are_judged_where_they_are_named(stack, teacher):
    chat = stack.chat(PROMPTS[1], n=4, max_tokens=12, reasoning_effort="none", adapter=None).json()
    rollouts = [{"completion_id": chat["id"], "index": index} for index in range(4)]
    body = {"adapter": "reader", "teacher": "pirate", "groups": [{"rollouts": rollouts}]}
    body |= {"divergence": {"type": "jsd", "beta": 0.5}, "epochs": 3, "learning_rate": 2e-3, "attach": False}
    job = stack.wait_for_job(stack.post("/v1/train/opd", body).json()["id"])
    assert job["status"] == "succeeded", job
    assert job["sources"] == {"rollout": 4}
    losses = [step["loss"] for step in job["history"]]
    assert losses[-1] < losses[0]
