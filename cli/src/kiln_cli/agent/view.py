"""How a person sees the agent: answers as they come, calls with their code, and a question before each."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax

from kiln_cli.agent.tools import Outcome
from kiln_cli.chat.turn import Answer

_LANGUAGES = {"python": "python", "shell": "bash"}


class TerminalView:
    """Answers go to `console`, calls and what they printed to `aside`.

    `ask(question)` returns what was typed; None where nobody is there. `allows_all` comes with --yes.
    """

    def __init__(
        self, console: Console, aside: Console, ask: Callable[[str], str] | None, *, allows_all: bool
    ) -> None:
        self._console = console
        self._aside = aside
        self._ask = ask
        self._allows_all = allows_all

    def piece(self, content: str, reasoning: str) -> None:
        if reasoning:
            self._aside.print(reasoning, style="dim italic", end="", markup=False, soft_wrap=True)
        if content:
            self._console.print(content, end="", markup=False, soft_wrap=True)

    def end_of_answer(self, answer: Answer) -> None:
        if answer.content:
            self._console.print()

    def may_run(self, tool: str, code: str) -> bool:
        """Nobody is asked without a terminal, and then nothing runs unless all is allowed."""
        self._aside.print(f"[cyan]{escape(tool)}[/cyan]")
        self._aside.print(Syntax(code, _LANGUAGES.get(tool, "text"), background_color="default"))
        if self._allows_all:
            return True
        if self._ask is None:
            self._aside.print("[yellow]not run[/yellow]: nobody can be asked; --yes allows calls")
            return False
        reply = self._ask("run it? [y]es, [a]lways, [N]o: ").strip().lower()
        self._allows_all = reply in ("a", "always")
        return self._allows_all or reply in ("y", "yes")

    def ran(self, outcome: Outcome) -> None:
        self._aside.print(outcome.for_model(), style="dim", markup=False, soft_wrap=True)
