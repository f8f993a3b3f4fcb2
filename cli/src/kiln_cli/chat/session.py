"""`kiln chat` at a terminal: turns, thinking shown apart, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

import kiln
from kiln_cli.chat.turn import Answer, stream_answer
from kiln_cli.hints import in_words_of_the_command

HELP = """\
/model NAME      let an adapter, name@version or base answer; alone: the attached default again
/models          what there is
/system TEXT     set the system message; alone: none
/think on|off    ask for thinking, or for none; alone: the server's default
/reset           forget the conversation
/help  /quit"""


class ChatSession:
    """A conversation and who answers it."""

    def __init__(
        self, client: kiln.Client, console: Console, fields: dict[str, Any], system: str | None
    ) -> None:
        self._client = client
        self._console = console
        self._fields = dict(fields)
        self._system = system
        self._turns: list[dict[str, Any]] = []

    def run(self, read: Callable[[], str]) -> None:
        """Until `read` raises EOFError, or /quit. Ctrl-C stops an answer and keeps the conversation."""
        self._console.print("[dim]/help lists commands; Ctrl-D ends.[/dim]")
        while True:
            try:
                text = read().strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if text in ("/quit", "/exit"):
                return
            try:
                if text.startswith("/"):
                    self._command(*text[1:].partition(" ")[::2])
                elif text:
                    self._ask(text)
            except kiln.KilnError as error:
                message = in_words_of_the_command(error.message)
                self._console.print(f"[red]{escape(error.code)}[/red]: {escape(message)}")
                if error.hint:
                    self._console.print(f"[dim]{escape(in_words_of_the_command(error.hint))}[/dim]")
            except KeyboardInterrupt:
                self._console.print("\n[dim]stopped; this turn is forgotten[/dim]")

    def _ask(self, text: str) -> None:
        turns = [*self._turns, {"role": "user", "content": text}]
        head = [{"role": "system", "content": self._system}] if self._system else []
        answer = ask(self._client, self._console, {**self._fields, "messages": head + turns})
        self._turns = [*turns, answer.message()]
        self._console.print(f"[dim]{escape(footer(answer))}[/dim]\n")

    def _command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        if name in ("model", "adapter"):
            self._set_model(argument)
        elif name in ("models", "adapters"):
            for model in self._client.models():
                self._console.print(f"  {escape(model['id'])}")
        elif name == "system":
            self._system = argument or None
        elif name == "think" and argument in ("on", "off", ""):
            self._fields.pop("chat_template_kwargs", None)
            if argument:
                self._fields["chat_template_kwargs"] = {"enable_thinking": argument == "on"}
        elif name == "reset":
            self._turns = []
        elif name == "help":
            self._console.print(HELP, style="dim", markup=False)
        else:
            self._console.print(f"there is no /{escape(name)} {escape(argument)}; /help lists what there is")

    def _set_model(self, name: str) -> None:
        if not name:
            self._fields.pop("model", None)
            self._console.print("[dim]the attached default answers[/dim]")
            return
        self._client.request("GET", f"/v1/models/{name}")  # an unknown one is said now
        self._fields["model"] = name
        self._console.print(f"[dim]{escape(name)} answers[/dim]")


def ask(client: kiln.Client, console: Console, body: dict[str, Any]) -> Answer:
    """One streamed chat answer on `console`, thinking dimmed and apart."""
    was_thinking = False

    def show(content: str, reasoning: str) -> None:
        nonlocal was_thinking
        if reasoning:
            if not was_thinking:
                console.print("[dim]thinking[/dim]")
            console.print(reasoning, style="dim italic", end="", markup=False, soft_wrap=True)
            was_thinking = True
        if content:
            if was_thinking:
                console.print("\n")
                was_thinking = False
            console.print(content, end="", markup=False, soft_wrap=True)

    answer = stream_answer(client, "/v1/chat/completions", body, show)
    console.print()
    for call in answer.tool_calls:
        function = call["function"]
        console.print(f"[cyan]tool call[/cyan] {escape(function['name'])} {escape(function['arguments'])}")
    return answer


def footer(answer: Answer) -> str:
    """Who answered, and how long the answer is."""
    num_tokens = (answer.usage or {}).get("completion_tokens")
    cut = ", cut at its longest" if answer.finish_reason == "length" else ""
    return f"{answer.adapter} · {num_tokens} tokens{cut}"
