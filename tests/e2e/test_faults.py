"""Each service killed with SIGKILL in the middle: what users see, and that nothing accepted is lost."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Its own stack: what is killed here disturbs nobody else."""
    with Stack(tmp_path_factory.mktemp("faults")) as running:
        yield running


def _sft_body(stack: Stack, adapter: str, epochs: int) -> dict[str, Any]:
    examples = [
        {"prompt": f"What is {n} + {n}?", "completion": f"The answer to that is {2 * n}, I believe."}
        for n in range(1, 9)
    ]
    return {
        "adapter": adapter,
        "base_adapter": None,
        "examples": examples,
        "epochs": epochs,
        "seed": 7,
        "checkpoint_every": 1,
        "learning_rate": 1e-3,
        "lora": {"rank": 4, "alpha": 8},
        "attach": False,
    }


def _submit(stack: Stack, body: dict[str, Any]) -> str:
    response = stack.post("/v1/train/sft", body)
    assert response.status_code == 202, response.text
    return response.json()["id"]


def _wait_for_step(stack: Stack, job_id: str, step: int) -> None:
    wait_for(
        lambda: stack.get(f"/v1/train/jobs/{job_id}")["progress"]["step"] >= step,
        f"step {step} of {job_id}",
    )


def test_a_job_whose_trainer_died_ends_with_the_adapter_of_an_undisturbed_run(stack):
    undisturbed = stack.wait_for_job(_submit(stack, _sft_body(stack, "calm", epochs=12)))
    assert undisturbed["status"] == "succeeded", undisturbed

    job_id = _submit(stack, _sft_body(stack, "shaken", epochs=12))
    _wait_for_step(stack, job_id, 3)
    dead = stack.kill("trainer")
    stack.wait_for_restart("trainer", dead)
    job = stack.wait_for_job(job_id)
    assert job["status"] == "succeeded", job
    assert job["attempts"] >= 2
    assert job["result"]["sha256"] == undisturbed["result"]["sha256"]


def test_a_job_that_samples_its_student_goes_on_when_its_trainer_died(stack):
    prompts = [f"What is {n} + {n}?" for n in range(1, 5)]
    taught = stack.wait_for_job(_submit(stack, _sft_body(stack, "drifted", epochs=4)))
    assert taught["status"] == "succeeded", taught
    body = {"adapter": "drifted", "teacher": "base", "prompts": prompts, "epochs": 6, "checkpoint_every": 2}
    body |= {"rollout": {"n": 2, "max_tokens": 8, "prompts_per_step": 4}, "learning_rate": 1e-3}
    response = stack.post("/v1/train/opd", {**body, "attach": False})
    assert response.status_code == 202, response.text
    job_id = response.json()["id"]
    _wait_for_step(stack, job_id, 3)
    dead = stack.kill("trainer")
    stack.wait_for_restart("trainer", dead)
    job = stack.wait_for_job(job_id)
    assert job["status"] == "succeeded", job
    assert job["attempts"] >= 2
    assert [step["round"] for step in job["history"]] == [1, 2, 3, 4, 5, 6]
    # Of the pupils that were sampled on the way none is left, only what the jobs published.
    names = {entry["name"] for entry in stack.get("/v1/adapters")["data"]}
    assert job_id not in names
    assert job["result"]["version"] == 2


def test_chat_goes_on_while_the_trainer_is_away(stack):
    dead = stack.kill("trainer")
    assert stack.chat("What is 2 + 2?", max_tokens=4).status_code == 200
    stack.wait_for_restart("trainer", dead)
    stack.wait_until_ready()


def _stream_events(stack: Stack) -> tuple[int, str]:
    """Status and last data line of one streamed chat."""
    body = {
        "messages": [{"role": "user", "content": "Write a short, friendly email reply."}],
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 2000,
    }
    last = ""
    with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, timeout=60) as response:
        if response.status_code != 200:
            return response.status_code, response.read().decode()
        for line in response.iter_lines():
            if line.startswith("data:"):
                last = line
    return 200, last


def test_an_engine_killed_under_traffic_ends_requests_clearly_and_comes_back(stack):
    job_id = _submit(stack, _sft_body(stack, "survivor", epochs=40))
    _wait_for_step(stack, job_id, 2)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(_stream_events, stack) for _ in range(4)]
        wait_for(lambda: stack.get("/v1/stats")["engine"]["running"] == 4, "four running streams")
        dead = stack.kill("engine")
        waiting = pool.submit(stack.chat, "What is 1 + 1?", max_tokens=4)
        for stream in streams:
            status, last = stream.result(60)
            assert status == 200
            assert '"error"' in last
            assert '"engine_unavailable"' in last
        answer = waiting.result(60)
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "engine_unavailable"
            assert "Retry-After" in answer.headers
    stack.wait_for_restart("engine", dead)
    stack.wait_until_ready()
    assert stack.chat("What is 2 + 3?", max_tokens=4).status_code == 200
    # The trainer maps the new engine's weights and finishes what it had begun.
    job = stack.wait_for_job(job_id)
    assert job["status"] == "succeeded", job


def test_redis_killed_in_the_middle_loses_no_accepted_job_and_chat_goes_on(stack):
    job_ids = [_submit(stack, _sft_body(stack, f"kept-{n}", epochs=6)) for n in range(3)]
    _wait_for_step(stack, job_ids[0], 1)
    stop, statuses = threading.Event(), []

    def chat_on() -> None:
        while not stop.is_set():
            statuses.append(stack.chat("What is 3 + 4?", max_tokens=4).status_code)

    with ThreadPoolExecutor(1) as pool:
        chatting = pool.submit(chat_on)
        dead = stack.kill("redis")
        stack.wait_for_restart("redis", dead)
        jobs = [stack.wait_for_job(job_id) for job_id in job_ids]
        stop.set()
        chatting.result(30)
    assert [job["status"] for job in jobs] == ["succeeded"] * 3, jobs
    assert statuses
    assert set(statuses) == {200}
