"""Each service killed with SIGKILL in the middle: what users see, and that nothing accepted is lost.

The trainer is killed at every kind of moment of a job, which must end with the bytes of an undisturbed
one, published once, while chat goes on. A test knows where it kills from the job's own events, or holds
the job there: by a named pipe in the place of a file, or by stopping the service that the trainer waits for.
"""

import hashlib
import io
import json
import os
import re
import resource
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kiln_common.bus import keys
from kiln_common.bus.connect import connect
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.processes

NUM_STEPS = 10
_ROOM_BYTES = 256 << 20  # for everything but the activations of the large job


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Its own stack: what is killed here disturbs nobody else."""
    with Stack(tmp_path_factory.mktemp("faults"), env={"KILN_TRAINER_CLAIM_TIMEOUT_S": "2"}) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(stack):
    """sha256 of what the job gives when nothing happens to it."""
    job = stack.wait_for_job(_submit(stack, "calm"))
    assert job["status"] == "succeeded", job
    return job["result"]["sha256"]


def _submit(stack: Stack, adapter: str, **changed: Any) -> str:
    examples = [
        {"prompt": f"What is {n} + {n}?", "completion": f"The answer to that is {2 * n}, I believe."}
        for n in range(1, 9)
    ]
    body = {
        "adapter": adapter,
        "base_adapter": None,
        "examples": examples,
        "epochs": NUM_STEPS,
        "seed": 7,
        "checkpoint_every": 2,
        "learning_rate": 1e-3,
        "lora": {"rank": 4, "alpha": 8},
        "attach": False,
    }
    response = stack.post("/v1/train/sft", body | changed)
    assert response.status_code == 202, response.text
    return response.json()["id"]


def _events(stack: Stack, job_id: str) -> Iterator[dict[str, Any]]:
    """What happened to a job and what happens to it, until it has ended or its trainer has."""
    with httpx.stream("GET", f"{stack.url}/v1/train/jobs/{job_id}/events", timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def _await_event(stack: Stack, job_id: str, **wanted: Any) -> None:
    """Until an event with these fields has come."""
    for event in _events(stack, job_id):
        if wanted.items() <= event.items():
            return
    raise AssertionError(f"{job_id} ended without {wanted}")


def _attempts(stack: Stack, job_id: str) -> list[list[tuple[str, int]]]:
    """(type, step) of what each claim of an ended job wrote."""
    attempts: list[list[tuple[str, int]]] = []
    for event in _events(stack, job_id):
        if event["type"] == "claimed":
            attempts.append([])
        elif attempts:
            attempts[-1].append((event["type"], event.get("step", 0)))
    return attempts


@contextmanager
def _chat_going_on(stack: Stack) -> Iterator[None]:
    """Somebody who chats all the time, without trying again, and gets every answer."""
    stop = threading.Event()

    def chat() -> set[int]:
        statuses = set()
        while not (stop.is_set() and statuses):
            statuses.add(stack.chat("What is 3 + 4?", max_tokens=2, adapter=None).status_code)
            stop.wait(0.05)  # training needs the processor too
        return statuses

    with ThreadPoolExecutor(1) as pool:
        chatting = pool.submit(chat)
        try:
            yield
        finally:
            stop.set()
        assert chatting.result() == {200}


def _assert_published_once(stack: Stack, job_id: str, adapter: str, sha256: str) -> None:
    job = stack.wait_for_job(job_id)
    assert job["status"] == "succeeded", job
    assert (job["result"]["version"], job["result"]["sha256"]) == (1, sha256)
    assert job["result"]["not_live"] == []
    (version,) = stack.get(f"/v1/adapters/{adapter}")["versions"]
    assert version["sha256"] == sha256
    archive = httpx.get(f"{stack.url}/v1/adapters/{adapter}/download", timeout=30).raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(archive)) as folder:
        (name,) = (name for name in folder.getnames() if name.endswith(".safetensors"))
        assert hashlib.sha256(folder.extractfile(name).read()).hexdigest() == sha256
    answer = stack.chat("What is 2 + 2?", max_tokens=2, adapter=adapter)
    assert answer.headers["X-Kiln-Adapter"] == f"{adapter}@1"


def test_a_job_killed_at_its_start_begins_again(stack, undisturbed):
    with _chat_going_on(stack):
        job_id = _submit(stack, "at-start")
        _await_event(stack, job_id, type="started")
        dead = stack.kill("trainer")
        response = httpx.get(f"{stack.url}/v1/train/jobs/{job_id}", timeout=30)
        # Nobody can read the job now. Where the trainer would listen is not the client's business.
        assert (response.status_code, response.json()["error"]["code"]) == (503, "trainer_unavailable")
        assert str(stack.state_dir) not in response.text
        # And its successor, before it has begun.
        stack.wait_for_restart("trainer", dead)
        stack.kill("trainer")
        _assert_published_once(stack, job_id, "at-start", undisturbed)
    *killed, last = _attempts(stack, job_id)
    assert killed[0][0] == ("started", 0)
    # On a busy machine a trainer may have come to a checkpoint before it was killed.
    kept = [step for attempt in killed for kind, step in attempt if kind == "checkpoint"]
    assert last[0] == ("step", max(kept, default=0) + 1), killed


def test_a_job_killed_in_the_middle_of_a_step_goes_on_from_its_checkpoint(stack, undisturbed):
    with _chat_going_on(stack):
        job_id = _submit(stack, "mid-step")
        _await_event(stack, job_id, type="step", step=3)
        stack.kill("trainer")
        _assert_published_once(stack, job_id, "mid-step", undisturbed)
    first, second = _attempts(stack, job_id)
    assert first[:5] == [("started", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3)]
    last_saved = max(step for kind, step in first if kind == "checkpoint")
    assert second[0] == ("step", last_saved + 1)


def test_a_checkpoint_that_was_half_written_is_passed_over(stack, undisturbed):
    with _chat_going_on(stack):
        job_id = _submit(stack, "mid-checkpoint")
        _await_event(stack, job_id, type="step", step=1)
        half_written = stack.state_dir / "trainer/jobs" / job_id / "step-00000008.safetensors.tmp"
        os.mkfifo(half_written)
        with half_written.open("rb", buffering=0) as pipe:  # once the trainer writes
            begun = pipe.read(10_000)
            assert begun  # and there is more: the trainer cannot get it into the pipe
            on_disk = half_written.with_suffix(".begun")
            on_disk.write_bytes(begun)
            on_disk.replace(half_written)
            stack.kill("trainer")
        _assert_published_once(stack, job_id, "mid-checkpoint", undisturbed)
    first, second = _attempts(stack, job_id)
    assert first[-2:] == [("step", 7), ("step", 8)]
    assert second[0] == ("step", 7)


def test_a_job_killed_before_the_registrys_commit_publishes_once(stack, undisturbed):
    with _chat_going_on(stack):
        job_id = _submit(stack, "before-commit")
        _await_event(stack, job_id, type="step", step=1)
        with stack.stopped("registry"):
            _await_event(stack, job_id, type="publishing")
            stack.kill("trainer")
        _assert_published_once(stack, job_id, "before-commit", undisturbed)
    first, second = _attempts(stack, job_id)
    assert first[-1] == ("publishing", 0)
    # There is no checkpoint of the last step: its result was to be the version.
    assert second[0] == ("step", NUM_STEPS - 1)
    assert ("published", 0) in second


def test_a_job_killed_after_the_registrys_commit_finds_its_version_again(stack, undisturbed):
    with _chat_going_on(stack):
        job_id = _submit(stack, "after-commit")
        _await_event(stack, job_id, type="step", step=1)
        with ExitStack() as stopped:
            with stack.stopped("registry"):
                _await_claim_renewed_after(stack, job_id, "publishing")
                stopped.enter_context(stack.stopped("redis"))
            wait_for(lambda: _has_adapter(stack, "after-commit"), "the registry's commit")
            # What the trainer would write about it has nobody to take it.
            stack.kill("trainer")
        _assert_published_once(stack, job_id, "after-commit", undisturbed)
    first, second = _attempts(stack, job_id)
    # Redis may find the dead trainer's last words in its socket.
    assert first[-1] in (("publishing", 0), ("published", 0))
    assert second[-2:] == [("published", 0), ("succeeded", 0)]


def _has_adapter(stack: Stack, name: str) -> bool:
    return name in {adapter["name"] for adapter in stack.get("/v1/adapters")["data"]}


def _await_claim_renewed_after(stack: Stack, job_id: str, event_type: str) -> None:
    """Until the trainer has spoken to Redis once more after this event: it renews its claim before it publishes."""
    at_s = next(event["at_s"] for event in _events(stack, job_id) if event["type"] == event_type)
    with connect(f"unix://{stack.state_dir}/run/redis.sock") as client:

        def is_renewed() -> bool:
            renewed_at_s = client.zscore(keys.JOB_RUNNING, job_id)
            return renewed_at_s is not None and renewed_at_s > at_s

        wait_for(is_renewed, "the claim to be renewed")


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


def test_an_engine_killed_under_traffic_ends_requests_clearly_and_comes_back(stack, undisturbed):
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(_stream_events, stack) for _ in range(4)]
        wait_for(lambda: stack.get("/v1/stats")["engine"]["running"] == 4, "four running streams")
        job_id = _submit(stack, "survivor")
        _await_event(stack, job_id, type="step", step=3)
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
    # The trainer maps the new engine's weights and finishes what it had begun, under the same claim.
    _assert_published_once(stack, job_id, "survivor", undisturbed)
    assert len(_attempts(stack, job_id)) == 1


def test_a_job_that_samples_its_student_goes_on_when_its_trainer_died(stack):
    prompts = [f"What is {n} + {n}?" for n in range(1, 5)]
    taught = stack.wait_for_job(_submit(stack, "drifted", epochs=4))
    assert taught["status"] == "succeeded", taught
    body = {"adapter": "drifted", "teacher": "base", "prompts": prompts, "epochs": 6, "checkpoint_every": 2}
    body |= {"rollout": {"n": 2, "max_tokens": 8, "prompts_per_step": 4}, "learning_rate": 1e-3}
    response = stack.post("/v1/train/opd", {**body, "attach": False})
    assert response.status_code == 202, response.text
    job_id = response.json()["id"]
    _await_event(stack, job_id, type="step", step=3)
    stack.kill("trainer")
    job = stack.wait_for_job(job_id)
    assert job["status"] == "succeeded", job
    assert job["attempts"] >= 2
    assert [step["round"] for step in job["history"]] == [1, 2, 3, 4, 5, 6]
    # Of the pupils that were sampled on the way none is left, only what the jobs published.
    names = {entry["name"] for entry in stack.get("/v1/adapters")["data"]}
    assert job_id not in names
    assert job["result"]["version"] == 2


def test_redis_killed_in_the_middle_loses_no_accepted_job_and_chat_goes_on(stack):
    job_ids = [_submit(stack, f"kept-{n}") for n in range(3)]
    _await_event(stack, job_ids[0], type="step", step=1)
    with _chat_going_on(stack):
        dead = stack.kill("redis")
        stack.wait_for_restart("redis", dead)
        jobs = [stack.wait_for_job(job_id) for job_id in job_ids]
    assert [job["status"] for job in jobs] == ["succeeded"] * 3, jobs


def test_a_job_that_finds_no_memory_fails_clearly_and_the_next_one_is_served(stack, undisturbed):
    pid = stack.pid("trainer")
    limits = resource.prlimit(pid, resource.RLIMIT_AS)
    (size,) = re.findall(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    with _chat_going_on(stack):
        resource.prlimit(pid, resource.RLIMIT_AS, (1024 * int(size) + _ROOM_BYTES, limits[1]))
        long = {"prompt": "Go on.", "completion": "and so on, " * 1500}
        job = stack.wait_for_job(_submit(stack, "too-large", examples=[long] * 2, batch_tokens=16_000))
        resource.prlimit(pid, resource.RLIMIT_AS, limits)
        assert (job["status"], job["error"]["code"]) == ("failed", "training_out_of_memory"), job
        assert "tried to allocate" in job["error"]["message"]
        assert "batch_tokens" in job["error"]["hint"]
        assert not _has_adapter(stack, "too-large")
        _assert_published_once(stack, _submit(stack, "after-memory"), "after-memory", undisturbed)
    assert stack.pid("trainer") == pid
