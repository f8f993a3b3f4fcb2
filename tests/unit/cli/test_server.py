"""Which server a command asks, and what it says when that one does not answer."""

import re

import httpx
import pytest

import kiln.call
from kiln_cli.hints import in_words_of_the_command
from kiln_cli.server import find_server
from kiln_cli.up.state_dir import StateDirLock
from tests.support.command import Command
from tests.support.gateway import REPOSITORY

PAGE = (REPOSITORY / "docs/errors.md").read_text(encoding="utf-8")
HINTS = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", PAGE, flags=re.MULTILINE)
ROUTE = re.compile(r"\b(GET|POST|DELETE) /|Idempotency-Key|Bearer")
# What no command asks for: corrections, token ids, routes by their path.
WITHOUT_A_COMMAND = {
    "correction_not_found",
    "http_error",
    "invalid_token_ids",
    "method_not_allowed",
    "missing_field",
    "no_unused_corrections",
    "route_not_found",
    "too_many_corrections",
}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No server is named, and the usual port is nobody's."""
    monkeypatch.delenv("KILN_URL", raising=False)
    monkeypatch.delenv("KILN_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(kiln.call, "DEFAULT_URL", "http://127.0.0.1:1")
    return tmp_path / "kiln"


@pytest.fixture
def running(nowhere):
    with StateDirLock(nowhere) as lock:
        lock.announce("http://127.0.0.1:2")
        yield lock


def test_the_users_own_server_is_found_and_a_named_one_comes_first(running, nowhere, monkeypatch, tmp_path):
    assert find_server(None).url == "http://127.0.0.1:2"
    assert find_server("http://127.0.0.1:3").url == "http://127.0.0.1:3"
    assert find_server(None, tmp_path / "other").url is None
    monkeypatch.setenv("KILN_STATE_DIR", str(tmp_path / "other"))
    assert find_server(None).url is None
    monkeypatch.setenv("KILN_URL", "http://127.0.0.1:4")
    assert find_server(None).url == "http://127.0.0.1:4"


def test_a_command_says_which_server_it_took_when_that_one_does_not_answer(running, nowhere, capsys):
    run = Command(capsys)
    found = run("status")
    assert found.exit_code == 3
    assert "http://127.0.0.1:2 does not answer" in found.err
    assert f"the kiln up that has its state in {nowhere}" in found.err
    named = run("status", "--url", "http://127.0.0.1:3", "--json").json["error"]
    assert "http://127.0.0.1:3 does not answer" in named["message"]
    assert "given by --url or KILN_URL" in named["hint"]


def test_a_command_without_a_server_says_that_none_was_found(nowhere, capsys):
    shown = Command(capsys)("status").err
    assert f"the default: no kiln up has its state in {nowhere} now" in shown
    assert "kiln up starts a server" in shown


def test_hints_name_commands_where_there_are_some():
    with_a_route = {code for code, hint in HINTS if ROUTE.search(in_words_of_the_command(hint))}
    assert with_a_route == WITHOUT_A_COMMAND


def test_a_refusal_is_shown_in_the_words_of_the_command(monkeypatch, capsys):
    body = {
        "code": "job_not_found",
        "message": "no job; GET /v1/train/jobs lists others",
        "hint": "GET /v1/train/jobs lists the jobs there are.",
    }
    refusal = httpx.Response(404, json={"error": body})
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda self, request: refusal)
    shown = Command(capsys)("train", "status", "job_1")
    assert shown.exit_code == 4
    assert "no job; kiln train status shows others" in shown.err
    assert "kiln train status shows the jobs there are." in shown.err
