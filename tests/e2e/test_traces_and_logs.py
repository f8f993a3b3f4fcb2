"""Traces across real processes, and what their logs say and do not say."""

import itertools
import json

import pytest

from tests.support.otlp_collector import OtlpCollector
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.processes

SECRET = "xylophone-quartz-9137"


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    with OtlpCollector() as collector:
        stack = Stack(tmp_path_factory.mktemp("traced"), "--verbose", env=collector.environment)
        with stack:
            yield stack, collector


def trace_headers(number):
    trace_id = f"{number:032x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{1:016x}-01"}


def spans_by_name(collector, trace_id, wanted):
    """The trace's spans by (service, name), once all of `wanted` have arrived."""

    def arrived():
        found = {(span.service.removeprefix("kiln-"), span.name): span for span in collector.spans(trace_id)}
        return found if set(wanted) <= set(found) else None

    try:
        return wait_for(arrived, "the spans")
    except AssertionError:
        got = {(span.service, span.name) for span in collector.spans(trace_id)}
        raise AssertionError(f"of {wanted} only {got} arrived") from None


def test_one_trace_shows_a_chat_request_across_processes(traced):
    stack, collector = traced
    trace_id, headers = trace_headers(0xA1)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    response = stack.post("/v1/chat/completions", body, headers=headers)
    assert response.headers["X-Request-Id"] == f"req_{trace_id}"
    root = ("gateway", "POST /v1/chat/completions")
    choice, engine = ("gateway", "choice"), ("engine", "engine.request")
    below = {
        ("gateway", "prepare"): root,
        choice: root,
        engine: choice,
        ("engine", "engine.queue"): engine,
        ("engine", "engine.prefill"): engine,
        ("engine", "engine.decode"): engine,
        ("gateway", "detokenise"): choice,
        ("gateway", "rollout.save"): choice,
    }
    spans = spans_by_name(collector, trace_id, [root, *below])
    assert spans[root].parent_id == f"{1:016x}"
    for child, parent in below.items():
        assert spans[child].parent_id == spans[parent].span_id, child
        assert spans[parent].start_s - 0.05 <= spans[child].start_s <= spans[child].end_s, child
    assert "first_token" in spans[engine].events
    assert "first_token" in spans[choice].events
    assert spans[engine].attributes["kiln.completion_tokens"] == response.json()["usage"]["completion_tokens"]
    assert spans[root].attributes["http.response.status_code"] == 200
    in_order = [spans["engine", f"engine.{part}"] for part in ("queue", "prefill", "decode")]
    assert all(first.end_s == second.start_s for first, second in itertools.pairwise(in_order))


def test_one_trace_shows_a_job_from_its_post_to_its_versions_first_token(traced):
    stack, collector = traced
    trace_id, headers = trace_headers(0xB2)
    job = {"adapter": "traced", "prompt": "Hi", "completions": ["good", "bad"], "rewards": [1, 0]}
    response = stack.post("/v1/train/grpo", job, headers=headers)
    assert response.status_code == 202, response.text
    ended = stack.wait_for_job(response.json()["id"])
    assert ended["status"] == "succeeded", ended
    answer = stack.chat("Hi", model="traced", max_tokens=2)  # a request of its own, in another trace
    assert answer.headers["X-Kiln-Adapter"] == "traced@1"
    root, submit = ("gateway", "POST /v1/train/grpo"), ("trainer", "Trainer/Submit")
    attempt, publish = ("trainer", "job"), ("trainer", "job.publish")
    swap = ("engine", "engine.swap")
    below = {
        submit: root,
        ("trainer", "job.queue"): submit,
        attempt: submit,
        ("trainer", "job.train"): attempt,
        ("trainer", "job.step"): ("trainer", "job.train"),
        publish: attempt,
        ("registry", "Registry/Publish"): publish,
        ("engine", "Engine/PrepareAdapter"): publish,
        swap: ("engine", "Engine/PrepareAdapter"),
        ("trainer", "job.make_live"): attempt,
        ("engine", "adapter.first_token"): swap,
    }
    spans = spans_by_name(collector, trace_id, [root, *below])
    for child, parent in below.items():
        assert spans[child].parent_id == spans[parent].span_id, child
    assert spans[attempt].attributes["kiln.job_id"] == ended["id"]
    assert spans["engine", "adapter.first_token"].end_s > spans[swap].end_s
    assert [name for name, span in spans.items() if span.has_failed] == []


def test_a_trace_begins_with_the_requests_own_id(traced):
    stack, collector = traced
    refused = stack.chat("Hi", temperature=-1)
    error = refused.json()["error"]
    trace_id = error["request_id"].removeprefix("req_")
    root = ("gateway", "POST /v1/chat/completions")
    spans = spans_by_name(collector, trace_id, [root])
    assert spans[root].parent_id == ""
    assert spans[root].attributes["http.response.status_code"] == 400


def test_what_is_not_sampled_is_not_traced(traced):
    stack, collector = traced
    trace_id = f"{0xC3:032x}"
    stack.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
        headers={"traceparent": f"00-{trace_id}-{1:016x}-00"},
    )
    later, headers = trace_headers(0xC4)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    stack.post("/v1/chat/completions", body, headers=headers)
    spans_by_name(collector, later, [("engine", "engine.request")])
    assert collector.spans(trace_id) == []


def test_no_log_and_no_span_has_a_word_of_a_prompt(traced):
    stack, collector = traced
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": SECRET}}}
    for fields in (
        {"max_tokens": 4},
        {"max_tokens": 4, "stream": True},
        {"stop": SECRET, "max_tokens": 4},
        {"response_format": schema},
        {"max_tokens": SECRET},
        {SECRET: 1},
        {"model": SECRET},
        {"max_tokens": 10**9},
    ):
        stack.chat(f"Say {SECRET}", **fields)
    stack.post("/v1/tokenize", {"text": SECRET})
    stack.post(
        "/v1/messages", {"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": SECRET}]}
    )
    stack.post("/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET * 5000}]})
    for completions, rewards in (
        ([SECRET, "b"], [1, 0]),
        ([SECRET, "b"], [1, 1]),
        ([SECRET * 9000, "b"], [1, 0]),
    ):
        job = {"adapter": "quiet", "prompt": SECRET, "completions": completions, "rewards": rewards}
        response = stack.post("/v1/train/grpo", job)
        if response.status_code == 202:
            stack.wait_for_job(response.json()["id"])
    trace_id, headers = trace_headers(0xD5)
    stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]}, headers=headers)
    spans_by_name(collector, trace_id, [("engine", "engine.request")])
    logs = [*stack.state_dir.glob("logs/*.log"), stack.state_dir / "up.log"]
    assert {log.stem for log in logs} >= {"gateway", "engine", "trainer", "registry", "redis"}
    for log in logs:
        assert SECRET not in log.read_text(encoding="utf-8"), log.name
    assert SECRET not in repr(collector.spans())


def test_logs_are_json_lines_that_name_their_job(traced):
    stack, _ = traced
    job = {"adapter": "named", "prompt": "Hi", "completions": ["good", "bad"], "rewards": [1, 0]}
    job_id = stack.post("/v1/train/grpo", job).json()["id"]
    stack.wait_for_job(job_id)
    for name in ("gateway", "engine", "trainer", "registry"):
        text = (stack.state_dir / "logs" / f"{name}.log").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        assert lines
        assert all({"event", "level", "timestamp", "service"} <= set(line) for line in lines), name
    trainer = (stack.state_dir / "logs" / "trainer.log").read_text(encoding="utf-8")
    of_job = {line["event"] for line in map(json.loads, trainer.splitlines()) if line.get("job_id") == job_id}
    assert {"job_accepted", "job_claimed", "adapter_live", "job_ended"} <= of_job
