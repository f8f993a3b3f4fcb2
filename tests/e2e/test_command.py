"""Every example of `kiln … --help` and every command in docs/, run as they stand against a real stack."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import kiln
from tests.support.command import Command, leaves

pytestmark = pytest.mark.processes
DOCS = Path(__file__).resolve().parents[2] / "docs"
# They start a stack or end only with Ctrl-C; test_demo.py, the stack fixture and unit tests run those.
STARTS_A_STACK = ("kiln up", "kiln serve", "kiln demo")
# Needs a hub; test_models_pull.py brings one.
NEEDS_A_HUB = "kiln models pull"


def commands_of_help():
    for _, command in leaves():
        yield from re.findall(r"\[bold\](kiln .*?)\[/bold\]", command.help or "", re.DOTALL)


def commands_of_docs():
    for page in sorted(DOCS.glob("*.md")):
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
            yield from (line for line in block.splitlines() if line.startswith("kiln "))


EXAMPLES = [
    text
    for text in dict.fromkeys([*commands_of_help(), *commands_of_docs()])
    if not text.startswith((*STARTS_A_STACK, NEEDS_A_HUB))
]


@pytest.fixture(scope="module")
def work(stack, tmp_path_factory):
    """A folder with the files that the examples name, and a job that has ended."""
    folder = tmp_path_factory.mktemp("work")
    cases = [{"prompt": "What is 2 + 3?", "scorer": {"type": "contains", "target": "5"}}]
    texts = ["Thank you, see you soon.", "No."]
    examples = [{"prompt": "Who are you?", "completion": texts[0]}, {"prompt": "Hi", "completion": "Hello"}]
    scored = [{"prompt": "Write a short reply.", "completion": text, "reward": len(text)} for text in texts]
    for name, rows in {
        "examples.jsonl": examples,
        "calibration.jsonl": examples * 200,  # long enough to calibrate with
        "scored.jsonl": scored,
        "sums.jsonl": cases,
        "prompts.jsonl": [{"prompt": "Who are you?"}, {"prompt": "What is 2 + 3?"}],
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with kiln.Client(stack.url) as client:
        client.train.sft("student", examples, attach=False).wait()
        job = client.train.sft("polite", examples, attach=False).wait()
        names = {
            "JOB": job.id,
            "--calibration examples.jsonl": "--calibration calibration.jsonl",
            "~/notes": str(folder),
            "~/models/Qwen3.5-4B": str(DOCS.parent / "demo" / "model"),
        }
        names["DATASET"] = client.datasets.upload(folder / "examples.jsonl")["id"]
        client.evals.put_suite("first", cases)
        for name in ("RUN_1", "RUN_2", "RUN"):  # the last one is deleted
            names[name] = client.evals.run("first", "base", max_tokens=16).wait().id
        yield folder, names
        client.adapters.detach()


@pytest.fixture
def run(stack, work, capsys, monkeypatch):
    monkeypatch.chdir(work[0])
    monkeypatch.setenv("KILN_URL", stack.url)
    monkeypatch.setenv("KILN_STATE_DIR", str(stack.state_dir))
    return Command(capsys)


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_does_what_it_says(run, work, example, monkeypatch):
    if example.startswith(("kiln chat", "kiln agent")):
        monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?"))
    for name, value in work[1].items():
        example = example.replace(name, value)
    ran = run(*shlex.split(example)[1:])
    assert ran.exit_code == 0, ran.out + ran.err
    assert ran.out
    if "--json" in example:
        for line in ran.out.splitlines():
            json.loads(line)


def test_the_server_of_a_state_folder_is_found_by_itself(run, stack, monkeypatch):
    monkeypatch.delenv("KILN_URL")
    found = run("status")
    assert found.exit_code == 0
    assert stack.url in found.out


def test_an_answer_is_printed_and_thinking_is_kept_apart(run):
    plain = run("chat", "What is 2 + 3?", "--model", "base", "--temperature", "0", "--max-tokens", "24")
    assert plain.exit_code == 0
    assert "5" in plain.out
    assert "base · " in plain.err

    answer = run("chat", "What is 2 + 3?", "--model", "base", "--think", "--max-tokens", "8", "--json").json
    assert answer["adapter"] == "base"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["reasoning"]
    assert answer["content"] == ""


def test_a_conversation_switches_who_answers_and_says_what_went_wrong(run, stack, monkeypatch, capsys):
    from rich.console import Console

    from kiln_cli.chat.session import ChatSession

    typed = iter(
        ["/help", "/model polite", "Hello", "/model nobody", "/models", "/think off", "/what", "/quit"]
    )
    with kiln.Client(stack.url) as client:
        ChatSession(client, Console(width=100), {"max_tokens": 4}, None).run(lambda: next(typed))
    out = capsys.readouterr().out
    assert "polite answers" in out
    assert re.search(r"polite@\d+ · \d+ tokens", out)
    assert "model_not_found: " in out
    assert "polite@1" in out
    assert "there is no /what" in out


def test_a_job_that_fails_or_is_refused_has_its_exit_code(run, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n[1]\n')
    refused = run("train", "sft", str(broken), "-a", "x", "--json")
    assert refused.exit_code == 2
    assert "2 broken lines: line 2: " in refused.json["error"]["message"]

    broken.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n')
    refused = run("train", "sft", str(broken), "-a", "x")
    assert refused.exit_code == 4
    assert "conflicting_fields: line 3: an example is either" in refused.err
    assert "request req_" in refused.err

    assert run("train", "status", "job_of_nobody").exit_code == 4
    assert run("train", "sft", "nowhere.jsonl", "-a", "x").exit_code == 2
    assert run("adapters", "rm", "polite").exit_code == 2


def test_uploaded_data_and_corrections_are_learned(run, work, stack):
    kept = run("data", "upload", "examples.jsonl")
    assert kept.exit_code == 0
    data = ("--dataset", kept.out.strip())
    assert run("train", "sft", *data, "-a", "kept", "--no-attach").exit_code == 0
    with kiln.Client(stack.url) as client:
        (answer,) = client.rollouts("Who are you?", max_tokens=8)
        client.corrections.add(answer.completion_id, "A friend.")
        learned = run("train", "sft", "--corrections", "-a", "corrected", "--no-attach", "--json")
        assert (learned.exit_code, learned.json["status"]) == (0, "succeeded")
        again = run("train", "sft", "--corrections", "-a", "corrected", "--no-attach")
        assert again.exit_code == 4  # each is learned once
        assert len(client.corrections.list()) == 1


def test_a_cancelled_job_is_an_answer_of_no(run, work):
    detached = run("train", "sft", "examples.jsonl", "-a", "long", "--epochs", "900", "--no-attach", "-d")
    job_id = detached.out.strip()
    assert run("train", "cancel", job_id).exit_code == 0
    watched = run("train", "watch", job_id, "--json")
    assert (watched.exit_code, watched.json["status"]) == (1, "cancelled")
    assert "cancelled" in run("train", "status", job_id).out


def test_at_a_terminal_a_job_is_watched_to_its_end(stack, work):
    from rich.console import Console

    from kiln_cli.train.live_view import watch

    terminal = Console(force_terminal=True, width=100, file=io.StringIO())
    with kiln.Client(stack.url) as client:
        examples = [json.loads(line) for line in (work[0] / "examples.jsonl").read_text().splitlines()]
        ended = watch(client.train.sft("seen", examples, epochs=8, attach=False), terminal)
    shown = terminal.file.getvalue()
    assert (ended.status, ended.version) == ("succeeded", "seen@1")
    assert "step 8/8" in shown
    assert "tokens/s" in shown
    assert re.search(r"loss .*█", shown)


def test_a_job_is_the_same_one_under_its_key(run):
    arguments = ("train", "sft", "examples.jsonl", "-a", "once", "--no-attach", "--idempotency-key", "k1")
    first, second = run(*arguments, "--json"), run(*arguments, "--json")
    assert first.json["id"] == second.json["id"]
    assert second.json["result"]["version"] == 1


def test_a_pulled_adapter_is_a_peft_folder_that_can_be_pushed(run, work):
    pulled = run("adapters", "pull", "polite@1", "-o", "pulled.tar.gz", "--json").json
    with tarfile.open("pulled.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        archive.extractall("pulled")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    (folder,) = Path("pulled").iterdir()
    pushed = run("adapters", "push", str(folder), "--name", "again", "--json").json
    assert pushed["sha256"] == pulled["sha256"]
    assert run("adapters", "push", "nowhere", "--name", "again").exit_code == 2


def test_nothing_that_listens_has_an_exit_code_of_its_own(run):
    ran = run("status", "--url", "http://127.0.0.1:9", "--json")
    assert ran.exit_code == 3
    assert ran.json["error"]["code"] == "connection_failed"


def test_commands_and_names_are_offered_to_the_shell(run, stack):
    def offered(words):
        environment = {
            **os.environ,
            "_KILN_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "KILN_URL": stack.url,
        }
        # The name it is called by decides which variable a shell sets.
        script = "import sys; sys.argv = ['kiln']; from kiln_cli.main import main; main([])"
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    assert offered("kiln adapt") == ["adapters"]
    assert "polite" in offered("kiln adapters show pol")
    assert offered("kiln chat --model ba") == ["base"]
    assert all(job.startswith("job_") for job in offered("kiln train watch job_"))


def test_ctrl_c_leaves_the_job_alone(run, stack):
    command = [
        sys.executable,
        "-m",
        "kiln_cli",
        "train",
        "sft",
        "examples.jsonl",
        "-a",
        "long",
        "--no-attach",
    ]
    with subprocess.Popen(
        [*command, "--epochs", "900"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would whatever the tests of such a job start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        job_id = next(line.split()[0] for line in process.stderr if "/900" in line)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert f"{job_id} goes on" in process.stderr.read()
    assert stack.get(f"/v1/train/jobs/{job_id}")["status"] == "running"
    assert run("train", "cancel", job_id).exit_code == 0


def test_a_load_is_answered_whole_and_a_refused_one_is_an_answer_of_no(run):
    found = run("bench", "-n", "6", "-c", "3", "--max-tokens", "8", "--json").json
    assert (found["requests"], found["failed"], found["output_tokens"]) == (6, 0, 48)
    assert found["first_token_ms"]["p50"] > 0
    refused = run("bench", "-n", "2", "--model", "nobody", "--json")
    assert (refused.exit_code, refused.json["failed"]) == (1, 2)
    assert refused.json["first_error"].startswith("model_not_found")
