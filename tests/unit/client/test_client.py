"""What the Python client makes of answers, with a fake network."""

import asyncio
import json

import httpx
import pytest

import kiln
from kiln.calls import conversations, grpo_groups


def client_of(answer, **options):
    """A client whose requests `answer(request)` answers."""
    client = kiln.Client("http://server", **options)
    client._http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    return client


def job(status="running", **fields):
    return {"id": "job_1", "kind": "sft", "status": status, **fields}


def sse(*events):
    return "".join(
        f"id: {event['id']}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events
    )


ERRORS = {
    400: kiln.InvalidRequestError,
    401: kiln.AuthenticationError,
    403: kiln.PermissionDeniedError,
    404: kiln.NotFoundError,
    409: kiln.ConflictError,
    413: kiln.TooLargeError,
    429: kiln.RateLimitError,
    500: kiln.ServerError,
    501: kiln.NotBuiltError,
    503: kiln.UnavailableError,
    504: kiln.ServerTimeoutError,
}


@pytest.mark.parametrize("status", ERRORS)
def test_each_status_is_an_exception_with_what_the_body_says(status):
    error = {"message": "no", "code": "a_code", "hint": "Try this.", "param": "n", "request_id": "req_1"}
    client = client_of(
        lambda request: httpx.Response(status, json={"error": error}, headers={"Retry-After": "2"})
    )
    with pytest.raises(kiln.ApiError) as caught:
        client.models()
    assert type(caught.value) is ERRORS[status]
    assert (caught.value.code, caught.value.hint, caught.value.param) == ("a_code", "Try this.", "n")
    assert (caught.value.request_id, caught.value.http_status) == ("req_1", status)
    assert caught.value.retry_after_s == 2.0
    assert str(caught.value) == "no (a_code). Try this."


def test_an_answer_that_is_not_kilns_is_a_server_error():
    client = client_of(lambda request: httpx.Response(502, text="<html>Bad gateway"))
    with pytest.raises(kiln.ServerError, match=r"answered 502: <html>Bad gateway \(http_502\)"):
        client.health()


def test_nothing_that_listens_is_a_failed_connection_with_a_hint():
    with pytest.raises(kiln.ConnectionFailed, match=r"http://127.0.0.1:9 does not answer.*kiln up"):
        kiln.Client("http://127.0.0.1:9/v1").models()


def test_the_environment_names_server_and_key(monkeypatch):
    monkeypatch.setenv("KILN_URL", "http://elsewhere:1/v1/")
    monkeypatch.setenv("KILN_API_KEY", "secret")
    with kiln.Client() as client:
        assert client.base_url == "http://elsewhere:1"
        assert client._http.headers["authorization"] == "Bearer secret"
        assert str(client.openai.base_url) == "http://elsewhere:1/v1/"


def test_prompts_are_texts_conversations_or_lists_of_either():
    hello = [{"role": "user", "content": "hello"}]
    assert conversations("hello") == [hello]
    assert conversations(hello) == [hello]
    assert conversations(["hello", hello]) == [hello, hello]
    assert conversations([]) == []


def rollout(text, completion_id, index=0):
    messages = [{"role": "user", "content": text}]
    return kiln.Rollout(messages, "answer", None, completion_id, index, "base", "stop")


def test_rollouts_of_one_conversation_form_a_group():
    groups = grpo_groups(
        [rollout("a", "c1"), rollout("b", "c2"), rollout("a", "c3"), rollout("b", "c2", 1)], [1, 2, 3, 4]
    )
    assert [[entry["completion_id"] for entry in group["rollouts"]] for group in groups] == [
        ["c1", "c3"],
        ["c2", "c2"],
    ]
    assert [entry["reward"] for entry in groups[1]["rollouts"]] == [2, 4]
    with pytest.raises(ValueError, match="1 rollouts and 2 rewards"):
        grpo_groups([rollout("a", "c1")], [1, 2])


def step(number):
    return {"id": f"{number}-0", "type": "step", "step": number, "num_steps": 3, "at_s": 1.0}


def test_a_stream_that_breaks_is_taken_up_where_it_broke_off():
    seen = []

    def answer(request):
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=job("succeeded", result={"adapter": "a", "version": 2}))
        seen.append(request.headers.get("last-event-id"))
        if len(seen) == 1:
            return httpx.Response(200, text=sse(step(1), step(2)))
        if len(seen) == 2:
            return httpx.Response(503, json={"error": {"message": "away", "type": "unavailable_error"}})
        return httpx.Response(200, text=sse(step(3), {"id": "4-0", "type": "succeeded"}))

    client = client_of(answer)
    found = client.train.job("job_1")
    assert [event.id for event in found.events()] == ["1-0", "2-0", "3-0", "4-0"]
    assert seen == [None, "2-0", "2-0"]
    assert found.version == "a@2"


def test_patience_with_a_server_that_is_away_has_an_end():
    def answer(request):
        if request.url.path.endswith("/events"):
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json=job())

    with pytest.raises(kiln.ConnectionFailed, match="refused"):
        list(client_of(answer).train.job("job_1").events(patience_s=0.1))


def test_waiting_ends_in_time_and_failures_carry_the_jobs_reason():
    error = {"code": "out_of_memory", "message": "no room", "hint": "Lower batch_tokens."}

    def answer(request):
        if request.url.path.endswith("/events"):
            return httpx.Response(
                200, text=": keepalive\n\n" + sse({"id": "1-0", "type": "failed", "error": error})
            )
        return httpx.Response(200, json=job("failed", error=error))

    waited = client_of(answer).train.job("job_1")
    with pytest.raises(kiln.JobFailed, match="no room") as caught:
        waited.wait()
    assert (caught.value.code, caught.value.hint, caught.value.job.status) == (
        "out_of_memory",
        "Lower batch_tokens.",
        "failed",
    )
    with pytest.raises(kiln.WaitTimedOut):
        waited.wait(timeout_s=-1.0)


def test_a_gate_that_was_not_passed_is_not_a_success():
    gate = {"passed": False, "reason": "the score 0.5 is below the least of 0.75"}

    def answer(request):
        if request.url.path.endswith("/events"):
            return httpx.Response(200, text=sse({"id": "1-0", "type": "succeeded"}))
        return httpx.Response(
            200, json=job("succeeded", result={"adapter": "job_1", "version": 1, "gate": gate})
        )

    waited = client_of(answer).train.job("job_1")
    with pytest.raises(kiln.GateNotPassed, match=r"job_1 did not pass its gate: the score 0\.5 is below"):
        waited.wait()
    assert (waited.state.gate_passed, waited.version) == (False, "job_1@1")
    gate["passed"] = True
    assert waited.wait().state.gate_passed is True
    assert kiln.JobState.of(job("succeeded")).gate_passed is None


def test_the_client_to_await_does_the_same():
    async def follow():
        def answer(request):
            if request.url.path.endswith("/events"):
                return httpx.Response(200, text=sse(step(1), {"id": "2-0", "type": "succeeded"}))
            return httpx.Response(200, json=job("succeeded"))

        async with kiln.AsyncClient("http://server") as client:
            await client._http.aclose()
            client._http = httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(answer))
            found = await client.train.sft("a", [{"prompt": "p", "completion": "c"}])
            events = [event.type async for event in found.events()]
            return events, (await found.wait()).status

    assert asyncio.run(follow()) == (["step", "succeeded"], "succeeded")


def test_an_error_within_a_stream_is_raised_with_its_class():
    from kiln.call import SseReader

    reader = SseReader()
    reader.feed('data: {"error": {"message": "late", "type": "timeout_error", "code": "deadline_exceeded"}}')
    with pytest.raises(kiln.ServerTimeoutError) as caught:
        reader.feed("")
    assert caught.value.code == "deadline_exceeded"


def test_a_data_set_is_sent_as_it_is(tmp_path):
    sent = []

    def answer(request):
        sent.append((request.method, str(request.url), request.content))
        return httpx.Response(201, json={"id": "ds_1"})

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n')
    assert client_of(answer).datasets.upload(path, name="rows") == {"id": "ds_1"}
    assert sent == [("POST", "http://server/v1/datasets?name=rows", path.read_bytes())]


def test_broken_rows_reach_the_caller_with_their_lines():
    error = {"message": "2 lines are broken", "code": "invalid_dataset", "details": {"lines": [1, 7]}}
    client = client_of(lambda request: httpx.Response(400, json={"error": error}))
    with pytest.raises(kiln.InvalidRequestError) as caught:
        client.datasets.list()
    assert caught.value.details == {"lines": [1, 7]}


def eval_run(status, **fields):
    return {"id": "evalrun_1", "status": status, "adapter": "base", **fields}


def test_a_run_is_waited_for_and_the_bare_base_model_is_null():
    bodies, states = (
        [],
        [eval_run("running", progress={"done": 1, "cases": 2}), eval_run("succeeded", score={"mean": 1})],
    )

    def answer(request):
        if request.method == "POST":
            bodies.append(json.loads(request.content))
            return httpx.Response(202, json=eval_run("queued"))
        return httpx.Response(200, json=states.pop(0))

    progress = []
    run = client_of(answer).evals.run("sums", "base", max_tokens=8)
    run.wait(on_progress=lambda done, cases: progress.append((done, cases)))
    assert bodies == [{"suite": "sums", "adapter": None, "sampling": {"max_tokens": 8}}]
    assert progress[0] == (1, 2)
    assert run.score == {"mean": 1}


def test_runs_are_listed_and_deleted():
    asked = []

    def answer(request):
        asked.append((request.method, request.url.raw_path.decode()))
        found = {"data": [eval_run("succeeded", score={"mean": 1})]}
        return httpx.Response(200, json=found if request.method == "GET" else {"deleted": True})

    client = client_of(answer)
    (run,) = client.evals.runs("polite@1", status="succeeded", limit=5)
    assert run.score == {"mean": 1}
    client.evals.runs()
    client.evals.delete_run(run.id)
    assert asked == [
        ("GET", "/v1/evals/runs?adapter=polite%401&status=succeeded&limit=5"),
        ("GET", "/v1/evals/runs?limit=100"),
        ("DELETE", "/v1/evals/runs/evalrun_1"),
    ]


def test_a_run_that_failed_says_why():
    error = {"code": "engine_unavailable", "message": "away", "hint": "Wait."}
    run = client_of(lambda request: httpx.Response(202, json=eval_run("failed", error=error))).evals.run(
        "s", "a"
    )
    with pytest.raises(kiln.EvalFailed, match="away") as caught:
        run.wait()
    assert (caught.value.code, caught.value.run["id"]) == ("engine_unavailable", "evalrun_1")
