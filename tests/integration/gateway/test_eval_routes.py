"""Suites and runs over HTTP: a scripted engine answers, the registry's own store keeps the results."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from kiln_common.errors import EngineUnavailable, RegistryUnavailable
from kiln_gateway.evals.evaluator import Evaluator
from tests.support.gateway import gateway_rig

KEYS = (
    {"key": "a-key-of-sixteen-chars", "scopes": ["infer", "train"]},
    {"key": "another-key-of-others", "scopes": ["infer", "train"]},
    {"key": "a-key-that-only-infers", "scopes": ["infer"]},
)


def exact(prompt, target):
    return {"prompt": prompt, "scorer": {"type": "exact", "target": target}}


QUESTIONS = [
    exact("Capital of Norway?", "Oslo"),
    exact("Capital of Italy?", "Rome"),
    exact("Capital of Spain?", "Madrid"),
]


def user_text(rig, request):
    """The last user message of a scripted engine's prompt."""
    prompt = rig.tokenizer.decode(list(request.prompt_token_ids))
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


@asynccontextmanager
async def evaluating(rig):
    gateway = rig.app.state.gateway
    async with Evaluator(gateway, gateway.clients.evaluations, concurrency=4, poll_s=0.01).working():
        yield


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path, max_model_len=2048) as rig:
        yield rig


async def put_suite(rig, cases=QUESTIONS, name="capitals", **options):
    response = await rig.post("/v1/evals/suites", {"name": name, "cases": cases}, **options)
    assert response.status_code == 201, response.text
    return response.json()


async def start(rig, suite="capitals", **fields):
    response = await rig.post("/v1/evals/runs", {"suite": suite, **fields})
    assert response.status_code == 202, response.text
    return response.json()


async def ended(rig, run_id, **options):
    """The run with its cases, once it has ended."""
    async with asyncio.timeout(60):
        while True:
            run = (await rig.http.get(f"/v1/evals/runs/{run_id}?cases=true", **options)).json()
            if run["status"] in ("succeeded", "failed"):
                return run
            await asyncio.sleep(0.01)


async def run_to_end(rig, suite="capitals", **fields):
    async with evaluating(rig):
        return await ended(rig, (await start(rig, suite, **fields))["id"])


async def test_a_run_answers_every_case_and_scores_it(rig):
    suite = await put_suite(rig)
    rig.engine.script = lambda request: "Oslo" if "Norway" in user_text(rig, request) else "Rome"
    run = await run_to_end(rig)
    assert (run["status"], run["adapter"], run["suite"]["id"]) == ("succeeded", "base", suite["id"])
    assert run["progress"] == {"done": 3, "cases": 3}
    assert [case["score"] for case in run["cases"]] == [1.0, 1.0, 0.0]
    assert [case["answer"] for case in run["cases"]] == ["Oslo", "Rome", "Rome"]
    assert run["score"]["mean"] == pytest.approx(2 / 3)
    assert (run["score"]["low"], run["score"]["high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert (run["score"]["method"], run["score"]["confidence"], run["num_invalid"]) == ("wilson", 0.95, 0)
    assert run["error"] is None


async def test_answers_are_drawn_as_the_run_says_and_leave_no_rollouts(rig):
    await put_suite(rig)
    rig.registry.add("helper")
    rig.registry.add("helper", attach=True)
    run = await run_to_end(
        rig, adapter="helper@1", sampling={"max_tokens": 7, "temperature": 0.5, "seed": 40}
    )
    assert run["adapter"] == "helper@1"
    for request in rig.engine.requests:
        assert [(ref.name, ref.version) for ref in request.adapters] == [("helper", 1)]
        assert (request.sampling.max_tokens, request.sampling.temperature) == (7, 0.5)
        assert request.priority == 1
    assert {request.sampling.seed for request in rig.engine.requests} == {40, 41, 42}
    # Left out: the default that is attached. null: the bare base model.
    assert (await start(rig))["adapter"] == "helper@2"
    assert (await start(rig, adapter=None))["adapter"] == "base"


async def test_a_suite_gets_versions_and_keeps_the_old_ones(rig):
    first = await put_suite(rig)
    assert (first["version"], first["num_cases"]) == (1, 3)
    assert (await put_suite(rig))["id"] == first["id"]
    second = await put_suite(rig, QUESTIONS[:1])
    assert second["version"] == 2
    listed = (await rig.http.get("/v1/evals/suites")).json()["data"]
    assert [suite["id"] for suite in listed] == [second["id"]]
    for reference, expected in [("capitals", second), ("capitals@1", first), (first["id"], first)]:
        assert (await start(rig, reference))["suite"]["id"] == expected["id"]


async def test_a_suite_comes_as_the_file_it_is(rig):
    text = "\n".join(json.dumps(case) for case in QUESTIONS) + "\n"
    response = await rig.post("/v1/evals/suites", {"name": "file", "jsonl": text})
    assert (response.status_code, response.json()["num_cases"]) == (201, 3)
    broken = text + "not json\n"
    error = (await rig.post("/v1/evals/suites", {"name": "file", "jsonl": broken})).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_suite", "jsonl")
    assert "line 4: not JSON" in error["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"suite": "nothing"}, "eval_suite_not_found"),
        ({"suite": "capitals@9"}, "eval_suite_not_found"),
        ({"suite": "capitals", "adapter": "nobody"}, "adapter_not_found"),
        ({"suite": "capitals", "sampling": {"temperature": 3}}, "invalid_value"),
        ({"suite": "capitals", "adaptor": "x"}, "unknown_field"),
    ],
)
async def test_a_run_that_cannot_be_is_refused(rig, body, code):
    await put_suite(rig)
    assert (await rig.post("/v1/evals/runs", body)).json()["error"]["code"] == code


async def listed(rig, query="", **options):
    response = await rig.http.get(f"/v1/evals/runs{query}", **options)
    assert response.status_code == 200, response.text
    return [run["id"] for run in response.json()["data"]]


async def test_runs_are_listed_the_newest_first_and_chosen_by_adapter_and_status(rig):
    await put_suite(rig)
    rig.registry.add("helper")
    rig.registry.add("helper")
    rig.registry.add("helper_2")
    done = await run_to_end(rig, adapter="helper@1")
    on_base, newer, other = [
        (await start(rig, adapter=adapter))["id"] for adapter in (None, "helper", "helper_2")
    ]
    assert await listed(rig) == [other, newer, on_base, done["id"]]
    assert await listed(rig, "?limit=2") == [other, newer]
    assert await listed(rig, "?adapter=helper") == [newer, done["id"]]
    assert await listed(rig, "?adapter=helper@2") == [newer]
    assert await listed(rig, "?adapter=base") == [on_base]
    assert await listed(rig, "?status=succeeded") == [done["id"]]
    (first,) = (await rig.http.get("/v1/evals/runs?status=succeeded")).json()["data"]
    done.pop("cases")
    assert first == done
    for query in ("?adaptor=helper", "?limit=0", "?limit=501", "?status=done"):
        assert (await rig.http.get(f"/v1/evals/runs{query}")).status_code == 400


async def test_a_deleted_run_is_gone_with_its_cases_and_its_suite_stays(rig):
    await put_suite(rig)
    run = await run_to_end(rig)
    path = f"/v1/evals/runs/{run['id']}"
    assert (await rig.http.delete(path)).json() == {"id": run["id"], "object": "eval.run", "deleted": True}
    for response in (await rig.http.get(path), await rig.http.delete(path)):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "eval_run_not_found")
    assert await listed(rig) == []
    assert len((await rig.http.get("/v1/evals/suites")).json()["data"]) == 1


async def test_a_run_that_is_deleted_while_it_is_carried_out_ends_and_the_next_one_goes_on(rig):
    await put_suite(rig)
    rig.engine.pause_after = 0
    async with evaluating(rig):
        run = await start(rig)
        await rig.engine.paused.wait()
        assert (await rig.http.delete(f"/v1/evals/runs/{run['id']}")).status_code == 200
        while len(rig.engine.aborted) < len(QUESTIONS):  # its answers are stopped, not finished
            await asyncio.sleep(0.01)
        rig.engine.pause_after = None
        assert (await ended(rig, (await start(rig))["id"]))["status"] == "succeeded"


async def test_names_and_unknown_runs_are_refused(rig):
    error = (await rig.post("/v1/evals/suites", {"name": "a b", "cases": QUESTIONS})).json()["error"]
    assert error["code"] == "invalid_suite_name"
    response = await rig.http.get("/v1/evals/runs/evalrun_none")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "eval_run_not_found")
    error = (await rig.post("/v1/evals/suites", {"name": "a"})).json()["error"]
    assert error["code"] == "conflicting_fields"


async def test_every_scorer_works_on_what_the_model_says(rig):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    cases = [
        {"prompt": "number", "scorer": {"type": "numeric", "target": 4}},
        {"prompt": "choose", "scorer": {"type": "multiple_choice", "choices": ["tea", "soup"], "answer": 1}},
        {"prompt": "json", "scorer": {"type": "json_schema", "schema": {"type": "object"}}},
        {"messages": [{"role": "user", "content": "call"}], "tools": [tool], "scorer": {"type": "tool_call", "name": "weather", "arguments": {"city": "Oslo"}}},
        {"prompt": "find", "scorer": {"type": "regex", "pattern": "f.und"}},
        {"prompt": "have", "scorer": {"type": "contains", "target": "it"}},
    ]  # fmt: skip
    call = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
    replies = {
        "number": "It is 4.",
        "choose": "B",
        "json": "{}",
        "call": call,
        "find": "found",
        "have": "got it",
    }
    rig.engine.script = lambda request: replies[user_text(rig, request).split("\n")[0]]
    await put_suite(rig, cases)
    run = await run_to_end(rig)
    assert [case["score"] for case in run["cases"]] == [1.0] * 6, run["cases"]
    assert set(run["by_scorer"]) == {
        "numeric",
        "multiple_choice",
        "json_schema",
        "tool_call",
        "regex",
        "contains",
    }
    asked = next(text for r in rig.engine.requests if (text := user_text(rig, r)).startswith("choose"))
    assert asked == "choose\n\nA. tea\nB. soup\n\nAnswer with the letter of the right choice."


async def test_a_judge_grades_and_an_unusable_verdict_is_invalid(rig):
    scorer = {"type": "judge", "criteria": "It is polite.", "model": "critic", "scale": 5}
    await put_suite(rig, [{"prompt": f"Ask {n}", "scorer": scorer} for n in range(3)])
    rig.registry.add("critic")

    def script(request):
        text = user_text(rig, request)
        if not text.startswith("Judge"):
            return f"Answer to {text}"
        return next(grade for n, grade in [(0, "5"), (1, "2"), (2, "9")] if f"Answer to Ask {n}" in text)

    rig.engine.script = script
    run = await run_to_end(rig)
    assert [(case["score"], case["is_valid"]) for case in run["cases"]] == [
        (1.0, True),
        (0.25, True),
        (0.0, False),
    ]
    assert run["cases"][0]["detail"] == "critic@1 judged 5"
    assert (run["score"]["method"], run["num_invalid"]) == ("bootstrap", 1)
    judged = [r for r in rig.engine.requests if user_text(rig, r).startswith("Judge")]
    assert [[ref.name for ref in request.adapters] for request in judged] == [["critic"]] * 3
    assert "It is polite." in user_text(rig, judged[0])


async def test_a_case_that_cannot_be_asked_is_invalid_and_the_rest_goes_on(rig):
    await put_suite(rig, [exact("word " * 5000, "x"), exact("Hi", "Hello there!")])
    run = await run_to_end(rig)
    assert run["status"] == "succeeded"
    assert [(case["score"], case["is_valid"]) for case in run["cases"]] == [(0.0, False), (1.0, True)]
    assert "prompt_too_long" in run["cases"][0]["detail"]


async def test_an_answer_that_cannot_be_judged_is_invalid(rig):
    scorer = {"type": "judge", "criteria": "polite " * 2000}
    await put_suite(rig, [{"prompt": "Hi", "scorer": scorer}])
    (case,) = (await run_to_end(rig))["cases"]
    assert (case["answer"], case["is_valid"]) == ("Hello there!", False)
    assert "prompt_too_long" in case["detail"]


async def test_a_run_fails_when_the_engines_serve_another_base_model_now(rig):
    await put_suite(rig)
    version = rig.registry.add("helper")
    run = await start(rig, adapter="helper")
    version.base_model_hash = "0" * 64
    async with evaluating(rig):
        run = await ended(rig, run["id"])
    assert (run["status"], run["error"]["code"]) == ("failed", "adapter_mismatch")


async def test_a_run_fails_with_a_reason_when_its_adapter_is_gone(rig):
    await put_suite(rig)
    rig.registry.add("helper")
    run = await start(rig, adapter="helper@1")
    await rig.registry.delete("helper")
    async with evaluating(rig):
        run = await ended(rig, run["id"])
    assert (run["status"], run["error"]["code"], run["score"]) == ("failed", "adapter_not_found", None)


async def test_an_engine_that_comes_back_is_waited_for(rig):
    await put_suite(rig)
    run = await start(rig, adapter=None)
    rig.engine.is_up = False
    async with evaluating(rig):
        async with asyncio.timeout(60):
            while (await rig.http.get(f"/v1/evals/runs/{run['id']}")).json()["status"] != "running":
                await asyncio.sleep(0.01)
        rig.engine.is_up = True
        assert (await ended(rig, run["id"]))["status"] == "succeeded"


async def test_a_gateway_that_stops_gives_its_run_back_with_what_is_done(rig):
    """The next one answers only what is left."""
    await put_suite(rig)
    run = await start(rig)
    rig.engine.script = lambda request: "Oslo"
    hold = asyncio.Event()
    generate = rig.engine.generate

    async def held(request):
        if "Norway" not in user_text(rig, request):
            await hold.wait()
        async for output in generate(request):
            yield output

    rig.engine.generate = held
    async with evaluating(rig), asyncio.timeout(60):
        while (left := (await rig.http.get(f"/v1/evals/runs/{run['id']}")).json())["progress"]["done"] != 1:
            await asyncio.sleep(0.01)
    assert left["status"] == "running"
    hold.set()
    async with evaluating(rig):
        run = await ended(rig, run["id"])
    assert (run["status"], run["progress"]["done"], len(rig.engine.requests)) == ("succeeded", 3, 3)


async def test_a_gateway_that_dies_is_followed_by_another_and_its_late_words_are_refused(rig):
    await put_suite(rig)
    run = await start(rig)
    store = rig.app.state.gateway.clients.evaluations
    dead = await store.claim_run(30.0)
    assert await store.claim_run(30.0) is None
    store.skipped_s = 31.0
    async with evaluating(rig):
        assert (await ended(rig, run["id"]))["status"] == "succeeded"
    with pytest.raises(Exception, match="is not the last one"):
        await store.report_cases(dead.id, dead.claim_epoch, [], 30.0)
    with pytest.raises(Exception, match="is not the last one"):
        await store.finish_run(dead.id, dead.claim_epoch, summary_json="{}")


async def test_a_run_that_kills_every_gateway_fails(rig):
    await put_suite(rig)
    run = await start(rig)
    store = rig.app.state.gateway.clients.evaluations
    for _ in range(3):
        assert (await store.claim_run(30.0)).id == run["id"]
        store.skipped_s += 31.0
    assert await store.claim_run(30.0) is None
    assert (await ended(rig, run["id"]))["error"]["code"] == "eval_run_crashed"


async def test_a_registry_that_is_away_delays_runs_and_loses_none(rig):
    await put_suite(rig)
    run = await start(rig)
    store = rig.app.state.gateway.clients.evaluations
    store.failure = RegistryUnavailable("away")
    async with evaluating(rig):
        await asyncio.sleep(0.05)  # some polls in vain
        store.failure = None
        assert (await ended(rig, run["id"]))["status"] == "succeeded"


async def test_two_versions_are_compared_case_by_case(rig):
    await put_suite(rig, [exact(f"Question {n}", "Yes") for n in range(8)])
    rig.registry.add("helper")
    rig.engine.script = lambda request: "Yes" if request.adapters else "No"
    async with evaluating(rig):
        base = await ended(rig, (await start(rig, adapter=None))["id"])
        new = await ended(rig, (await start(rig, adapter="helper"))["id"])
    found = (await rig.post("/v1/evals/compare", {"baseline": base["id"], "candidate": new["id"]})).json()
    assert (found["num_better"], found["num_worse"], found["num_same"]) == (8, 0, 0)
    assert (found["difference"]["mean"], found["test"], found["p_value"]) == (1.0, "mcnemar_exact", 2 / 256)
    assert [found[side]["adapter"] for side in ("baseline", "candidate")] == ["base", "helper@1"]


async def test_runs_that_cannot_be_compared_are_refused(rig):
    await put_suite(rig)
    await put_suite(rig, QUESTIONS[:2], name="fewer")
    waiting = await start(rig)
    async with evaluating(rig):
        one = await ended(rig, (await start(rig))["id"])
        fewer = await ended(rig, (await start(rig, "fewer"))["id"])
        warmer = await ended(rig, (await start(rig, sampling={"temperature": 1.0}))["id"])

    async def code(candidate):
        body = {"baseline": one["id"], "candidate": candidate}
        return (await rig.post("/v1/evals/compare", body)).json()["error"]["code"]

    assert await code(fewer["id"]) == "runs_not_comparable"
    assert await code(warmer["id"]) == "runs_not_comparable"
    assert await code("evalrun_none") == "eval_run_not_found"
    later = await start(rig)
    assert await code(later["id"]) == "eval_run_not_finished"
    assert waiting["status"] == "queued"


async def test_suites_and_runs_belong_to_the_key_that_made_them(tmp_path):
    async with gateway_rig(tmp_path, api_keys=KEYS) as rig:
        mine, other, weak = [{"Authorization": f"Bearer {key['key']}"} for key in KEYS]
        suite = await put_suite(rig, headers=mine)
        body = {"suite": "capitals"}
        run = (await rig.post("/v1/evals/runs", body, headers=mine)).json()
        assert (await rig.post("/v1/evals/runs", body, headers=other)).status_code == 404
        assert (await rig.post("/v1/evals/runs", {"suite": suite["id"]}, headers=other)).status_code == 404
        for method in ("GET", "DELETE"):
            found = await rig.http.request(method, f"/v1/evals/runs/{run['id']}", headers=other)
            assert found.status_code == 404
        assert (await listed(rig, headers=mine), await listed(rig, headers=other)) == ([run["id"]], [])
        assert (await rig.http.get("/v1/evals/suites", headers=other)).json()["data"] == []
        assert (await rig.post("/v1/evals/runs", body, headers=weak)).status_code == 403


async def test_an_adapter_of_another_key_is_evaluated_where_it_was_accepted(tmp_path):
    """The default is for everybody, and an admin may ask any adapter; anybody else finds their own."""
    admin_key = {"key": "an-admin-key-of-many-chars", "scopes": ["infer", "train", "admin"]}
    async with gateway_rig(tmp_path, api_keys=(*KEYS, admin_key)) as rig:
        train, _, _, admin = [{"Authorization": f"Bearer {key['key']}"} for key in (*KEYS, admin_key)]
        rig.registry.add("theirs", attach=True, owner="somebody")
        runs = []
        for headers, fields in ((train, {}), (admin, {"adapter": "theirs"})):
            await put_suite(rig, QUESTIONS[:1], headers=headers)
            body = {"suite": "capitals", **fields}
            runs.append((await rig.post("/v1/evals/runs", body, headers=headers)).json())
        refused = await rig.post("/v1/evals/runs", {"suite": "capitals", "adapter": "theirs"}, headers=train)
        assert refused.json()["error"]["code"] == "adapter_not_found"
        async with evaluating(rig):
            for headers, run in zip((train, admin), runs, strict=True):
                run = await ended(rig, run["id"], headers=headers)
                assert (run["status"], run["adapter"], run["error"]) == ("succeeded", "theirs@1", None)


async def test_a_failing_engine_fails_no_run_of_its_own(rig, monkeypatch):
    """Patience at its end, the run says why."""
    monkeypatch.setattr("kiln_gateway.evals.evaluator._PATIENCE_S", 0.0)
    await put_suite(rig)
    run = await start(rig)
    rig.engine.failure, rig.engine.fail_after = EngineUnavailable("the engine went away"), 0
    async with evaluating(rig):
        run = await ended(rig, run["id"])
    assert (run["status"], run["error"]["code"]) == ("failed", "engine_unavailable")


async def test_a_job_names_its_gates_suite_by_version(rig):
    suite = await put_suite(rig)
    gate = {"suite": "capitals", "min_score": 0.8, "sampling": {"max_tokens": 9}}
    body = {"adapter": "helper", "examples": [{"prompt": "a", "completion": "b"}], "gate": gate}
    response = await rig.post("/v1/train/sft", body)
    assert response.status_code == 202, response.text
    (request,) = rig.trainer.submitted
    assert (request.config.gate.suite_id, request.config.gate.suite) == (suite["id"], "capitals@1")
    shown = response.json()["effective_config"]["gate"]
    assert (shown["suite"], shown["min_score"], shown["sampling"]["max_tokens"]) == ("capitals@1", 0.8, 9)
    # A retry keeps the gate, takes another, or none.
    rig.trainer.jobs[response.json()["id"]].status = "failed"
    path = f"/v1/train/jobs/{response.json()['id']}/retry"
    other = {"suite": "capitals", "min_score": 0.5}
    for changes, least in (({}, 0.8), ({"gate": other}, 0.5), ({"gate": None}, None)):
        again = (await rig.post(path, changes)).json()["effective_config"].get("gate")
        assert (again and again["min_score"]) == least


async def test_a_conversation_with_calls_in_it_is_asked_as_it_is(rig):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "no", "tool_call_id": "c1"},
    ]
    await put_suite(rig, [{"messages": messages, "scorer": {"type": "contains", "target": "Hello"}}])
    run = await run_to_end(rig)
    assert run["cases"][0]["score"] == 1.0, run["cases"]
    prompt = rig.tokenizer.decode(list(rig.engine.requests[0].prompt_token_ids))
    assert "Be short." in prompt
    assert "<function=weather>\n<parameter=city>\nOslo" in prompt
    assert "<tool_response>\nno" in prompt
