"""`kiln train`: what it prints and ends with, against a fake network."""

import json

import httpx
import pytest

from tests.support.command import Command

HELD = {"passed": False, "reason": "the score 0.5 is below the least of 0.75"}


@pytest.fixture
def server(monkeypatch):
    """Give it `answer(request)`; every client of the command asks that one."""

    def serve(answer):
        def http_options(connection):
            return {"base_url": "http://server", "transport": httpx.MockTransport(answer)}

        monkeypatch.setattr("kiln.call.Connection.http_options", http_options)

    return serve


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    (tmp_path / "examples.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


def job(status="succeeded", **fields):
    return {"id": "job_1", "kind": "sft", "status": status, "effective_config": {"adapter": "a"}, **fields}


def events(*types):
    return "".join(
        f"id: {number}-0\ndata: {json.dumps({'id': f'{number}-0', 'type': kind})}\n\n"
        for number, kind in enumerate(types, start=1)
    )


@pytest.mark.parametrize(("passed", "exit_code"), [(False, 1), (True, 0)])
def test_a_gate_that_was_not_passed_is_an_answer_of_no(server, run, passed, exit_code):
    result = {"adapter": "job_1", "version": 1, "gate": {**HELD, "passed": passed}}

    def answer(request):
        if request.url.path.endswith("/events"):
            return httpx.Response(200, text=events("succeeded"))
        return httpx.Response(200, json=job(result=result))

    server(answer)
    shown = run("train", "watch", "job_1")
    assert shown.exit_code == exit_code
    assert ("the gate was not passed: the score 0.5 is below" in shown.out) is not passed
    as_json = run("train", "sft", "examples.jsonl", "-a", "a", "--json")
    assert (as_json.exit_code, as_json.json["result"]["gate"]["passed"]) == (exit_code, passed)


@pytest.mark.parametrize("command", [("sft", "examples.jsonl", "-a", "a"), ("retry", "job_0")])
def test_a_job_that_was_accepted_is_named_when_its_events_break_off(server, run, command):
    def answer(request):
        if request.url.path.endswith("/events"):
            return httpx.Response(404, json={"error": {"message": "gone", "code": "job_not_found"}})
        return httpx.Response(200, json=job("running"))

    server(answer)
    broken = run("train", *command, "--json")
    assert (broken.exit_code, broken.json["error"]["job_id"]) == (4, "job_1")
    assert "idempotency_key" not in broken.json["error"]
    assert "kiln train watch job_1 follows it again" in run("train", *command).err


def test_ctrl_c_names_the_job_in_json_too(server, run):
    def answer(request):
        if request.url.path.endswith("/events"):
            raise KeyboardInterrupt
        return httpx.Response(200, json=job("running"))

    server(answer)
    stopped = run("train", "watch", "job_1", "--json")
    assert (stopped.exit_code, stopped.json["error"]["job_id"]) == (130, "job_1")
    assert stopped.json["error"]["code"] == "interrupted"


@pytest.mark.parametrize("command", [("sft", "examples.jsonl", "-a", "a"), ("retry", "job_0")])
def test_a_submission_whose_answer_is_lost_names_its_key(server, run, command):
    keys = []

    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json=job())
        keys.append(request.headers["idempotency-key"])
        raise httpx.ReadError("reset")

    server(answer)
    lost = run("train", *command, "--json")
    assert (lost.exit_code, lost.json["error"]["idempotency_key"]) == (3, keys[0])
    assert f"--idempotency-key {keys[0]} with" in run("train", *command, "--idempotency-key", keys[0]).err
    run("train", *command)
    assert keys[0] == keys[1] != keys[2]


def test_a_refused_submission_has_no_key_to_say(server, run):
    server(lambda request: httpx.Response(400, json={"error": {"message": "no", "code": "no"}}))
    refused = run("train", "sft", "examples.jsonl", "-a", "a", "--json")
    assert (refused.exit_code, "idempotency_key" in refused.json["error"]) == (4, False)


@pytest.mark.parametrize(
    ("options", "teacher"),
    [(["--teacher", "polite"], "polite"), (["--teacher-model", "big"], {"model": "big"})],
)
def test_a_teacher_is_an_adapter_or_another_engines_model(server, run, tmp_path, options, teacher):
    bodies = []

    def answer(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(202, json=job(status="queued", kind="opd"))

    server(answer)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert run("train", "opd", "prompts.jsonl", "-a", "a", *options, "--detach").exit_code == 0
    assert bodies[0]["teacher"] == teacher
    both = run("train", "opd", "prompts.jsonl", "-a", "a", "--teacher", "x", "--teacher-model", "y")
    assert both.exit_code != 0
    assert len(bodies) == 1


def test_what_is_odd_about_a_job_is_said_beside_its_id(server, run):
    warning = {"code": "sampled_by_another_adapter", "message": "2 of 2 …", "hint": "Send …"}
    server(lambda request: httpx.Response(202, json=job("queued", warnings=[warning])))
    result = run("train", "sft", "examples.jsonl", "-a", "a", "--detach")
    assert result.out == "job_1\n"
    assert result.err.startswith("warning: 2 of 2 …. Send …\n")
    as_json = run("train", "sft", "examples.jsonl", "-a", "a", "--detach", "--json")
    assert json.loads(as_json.out)["warnings"] == [warning]
    assert as_json.err == ""
