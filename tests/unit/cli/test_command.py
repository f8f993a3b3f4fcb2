"""What `kiln` says about itself, and how it ends."""

import json

import pytest
from typer.testing import CliRunner

import kiln
import kiln_cli
from kiln_cli import exit_codes
from kiln_cli.main import app
from kiln_cli.output import Output
from kiln_cli.session import Session, run_reporting
from tests.support.command import Command, leaves


def session():
    return Session(Output(as_json=True), "http://127.0.0.1:1", None)


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_the_version_is_printed(arguments):
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, f"{kiln_cli.__version__}\n")


def test_the_demos_help_explains_its_exit_codes():
    result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for meaning in ("Exit code 0: it learned", "1: it ran to its end", "2: it could not", "130: it was"):
        assert meaning in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "command"),
    list(leaves()),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_command_has_json_and_help_with_an_example(words, command):
    assert "--json" in {name for param in command.params for name in param.opts}
    if words != ("serve",):
        assert f"[bold]kiln {' '.join(words)}" in command.help
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    assert "Usage: kiln" in shown.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (kiln.ConnectionFailed("away"), 3),
        (kiln.UnavailableError("away"), 3),
        (kiln.NotFoundError("no"), 4),
        (kiln.InvalidRequestError("no"), 4),
        (kiln.ServerError("bug"), 5),
        (kiln.ServerTimeoutError("late"), 5),
        (kiln.NotBuiltError("later"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_ends_with_the_code_that_the_documentation_gives(error, code):
    def fail():
        raise error

    assert run_reporting(session(), fail) == code
    assert code in exit_codes.MEANINGS


def test_a_bug_is_not_hidden():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_reporting(session(), fail)


def test_an_error_is_json_on_standard_output_when_json_was_asked_for(capsys):
    run = Command(capsys)
    ran = run("train", "sft", "nowhere.jsonl", "--adapter", "a", "--json")
    assert (ran.exit_code, ran.err) == (2, "")
    assert ran.json["error"]["code"] == "file_unreadable"
    ran = run("up", "--gpu-sharing", "never", "--json")
    assert ran.json["error"]["code"] == "unknown_gpu_sharing"


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (("train", "sft"), "Missing option '--adapter'", "kiln train sft"),
        (("eval", "run", "x", "--max-tokens", "0"), "Invalid value for '--max-tokens'", "kiln eval run"),
        (("eval", "run", "x", "--nothing"), "No such option: --nothing", "kiln eval run"),
        (("up", "--port", "70000"), "Invalid value for '--port'", "kiln up"),
        (("burn",), "No such command 'burn'", "kiln"),
    ],
)
def test_wrong_usage_is_json_too_and_text_for_a_person(capsys, arguments, message, command):
    run = Command(capsys)
    ran = run(*arguments, "--json")
    assert (ran.exit_code, ran.err) == (2, "")
    error = ran.json["error"]
    assert (error["code"], error["hint"]) == ("wrong_usage", f"{command} --help shows what it takes.")
    assert message in error["message"]
    ran = run(*arguments)
    assert (ran.exit_code, ran.out) == (2, "")
    assert "Usage: " in ran.err


def test_json_keeps_the_exit_code_of_what_ran(capsys):
    run = Command(capsys)
    assert run("version", "--json").exit_code == 0
    assert run("status", "--url", "http://127.0.0.1:9", "--json").exit_code == 3


@pytest.mark.parametrize("data", [(), ("f.jsonl", "--dataset", "ds_1")])
def test_examples_come_from_one_place(capsys, data):
    ran = Command(capsys)("train", "sft", *data, "--adapter", "a", "--json")
    assert (ran.exit_code, ran.json["error"]["code"]) == (2, "no_training_data")


def test_nothing_is_asked_without_text(capsys):
    ran = Command(capsys)("chat", "  ")
    assert (ran.exit_code, ran.err.startswith("no_text: ")) == (2, True)


def test_help_does_not_load_what_only_commands_need():
    """`kiln --help` stays quick: the HTTP client, gRPC and torch are loaded by the commands that need them."""
    import subprocess
    import sys

    script = (
        "import sys\n"
        "from kiln_cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('httpx', 'kiln', 'grpc', 'openai', 'torch', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_happens_to_the_services_is_a_line_of_json_each(capsys, tmp_path):
    from kiln_cli.up.json_lines import UpJsonLines

    console = UpJsonLines("http://localhost:1", tmp_path, is_verbose=True)
    console.starting("a model", tmp_path)
    console.service_ready("engine", 1.23456, "on cpu")
    console.service_line("engine", '{"event": "x", "level": "error"}')
    console.all_ready()
    console.all_ready()
    console.service_exited("engine", -9, 0.5)
    console.stopped()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [
        "starting",
        "service_ready",
        "ready",
        "service_exited",
        "stopped",
    ]
    assert lines[1] == {"event": "service_ready", "service": "engine", "seconds": 1.235, "detail": "on cpu"}
    assert lines[2]["url"] == "http://localhost:1"
    assert lines[3]["how"] == "was killed by signal 9"
