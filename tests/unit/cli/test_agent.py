"""The agent's turns: what the model asks for, what a person allows, what runs."""

import io
import json

import httpx
import pytest
from rich.console import Console

import kiln
from kiln_cli.agent.session import Agent
from kiln_cli.agent.tools import Outcome, code_of
from kiln_cli.agent.view import TerminalView


class Model:
    """A server whose answers are given: text, or calls as (tool, arguments)."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.bodies = []
        self.client = kiln.Client("http://server")
        self.client._http = httpx.Client(
            base_url="http://server", transport=httpx.MockTransport(self._answer)
        )

    def _answer(self, request):
        self.bodies.append(json.loads(request.content))
        answer = self._answers.pop(0)
        if isinstance(answer, str):
            deltas, reason = [{"content": answer}], "stop"
        else:
            # A call comes in pieces, its arguments cut anywhere.
            deltas = []
            for index, (name, arguments) in enumerate(answer):
                text = arguments if isinstance(arguments, str) else json.dumps(arguments)
                start = {"name": name, "arguments": text[:3]}
                deltas.append({"tool_calls": [{"index": index, "id": f"call_{index}", "function": start}]})
                deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text[3:]}}]})
            reason = "tool_calls"
        chunks = [{"id": "chatcmpl_1", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        chunks.append({"id": "chatcmpl_1", "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        return httpx.Response(200, text=text, headers={"X-Kiln-Adapter": "base"})


class Workbench:
    """Stands for the sandbox; remembers what it was to run."""

    def __init__(self):
        self.ran = []

    def run(self, tool, code):
        self.ran.append((tool, code))
        return Outcome(0, "42", None)


def agent(model, *replies, allows_all=False, max_steps=8, nobody=False):
    typed = iter(replies)
    seen, aside = (Console(record=True, width=80, file=io.StringIO()) for _ in range(2))
    view = TerminalView(seen, aside, None if nobody else lambda question: next(typed), allows_all=allows_all)
    bench = Workbench()
    return Agent(model.client, bench, view, {}, max_steps), bench, seen, aside


def test_a_call_is_shown_asked_about_run_and_its_output_given_back():
    model = Model([("python", {"code": "print(6 * 7)"})], "It is 42.")
    works, bench, seen, aside = agent(model, "y")
    task = works.do("6 times 7?")
    assert bench.ran == [("python", "print(6 * 7)")]
    assert task.as_json() == {
        "answer": "It is 42.",
        "adapter": "base",
        "finish_reason": "stop",
        "calls": [
            {"tool": "python", "code": "print(6 * 7)", "exit_code": 0, "output": "42", "stopped": None}
        ],
        "steps_used_up": False,
    }
    asked, answered = model.bodies[1]["messages"][-2:]
    assert asked["tool_calls"][0]["function"]["arguments"] == '{"code": "print(6 * 7)"}'
    assert answered == {"role": "tool", "tool_call_id": "call_0", "content": "42"}
    assert "print(6 * 7)" in aside.export_text()
    assert seen.export_text().strip() == "It is 42."


@pytest.mark.parametrize(("nobody", "replies"), [(False, [""]), (False, ["n"]), (True, [])])
def test_what_is_not_allowed_is_not_run(nobody, replies):
    model = Model([("shell", {"code": "rm -r ."})], "As you wish.")
    works, bench, _, _ = agent(model, *replies, nobody=nobody)
    task = works.do("clean up")
    assert bench.ran == []
    assert "refused" in task.calls[0]
    assert model.bodies[1]["messages"][-1]["content"] == "The user did not allow this call."


def test_always_is_asked_once():
    call = [("python", {"code": "1"}), ("python", {"code": "2"})]
    works, bench, _, _ = agent(Model(call, call, "done"), "a")
    works.do("go")
    assert [code for _, code in bench.ran] == ["1", "2", "1", "2"]


def test_a_call_that_is_none_of_ours_is_answered_and_not_run():
    works, bench, _, _ = agent(
        Model([("browser", {"url": "x"}), ("python", '{"code": 1'), ("python", {"code": 1})], "ok")
    )
    task = works.do("go")
    assert bench.ran == []
    assert [call["refused"].split(";")[0].split(":")[0] for call in task.calls] == [
        "there is no tool 'browser'",
        "the arguments are not an object with `code`",
        "`code` is not text",
    ]


def test_steps_have_an_end_and_tasks_remember_each_other():
    call = [("python", {"code": "1"})]
    model = Model(call, call, "and now?")
    works, _, _, _ = agent(model, allows_all=True, max_steps=2)
    assert works.do("first").is_cut
    assert not works.do("second").is_cut
    contents = [message["content"] for message in model.bodies[2]["messages"] if message["role"] == "user"]
    assert contents == ["first", "second"]


def test_code_of_reads_both_tools():
    call = {"function": {"name": "shell", "arguments": '{"code": "ls"}'}}
    assert code_of(call) == ("shell", "ls")


def test_what_ended_a_call_is_said_to_the_model():
    assert (
        Outcome(None, "", "the code ran for 10 s").for_model()
        == "[no output]\n[ended: the code ran for 10 s]"
    )
    assert Outcome(3, "oh", None).for_model() == "oh\n[exit code 3]"
