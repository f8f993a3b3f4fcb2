"""`kiln agent` and `kiln run`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kiln_cli import exit_codes
from kiln_cli.chat.sampling import MaxTokens, Model, Temperature, request_fields
from kiln_cli.session import SERVER, Session, command

if TYPE_CHECKING:
    from kiln_cli.agent.session import Agent

Work = Annotated[
    Path | None,
    typer.Option(
        help="The folder that code may write to. A temporary one when left out. Under root, a folder of root's is given to the user nobody.",
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Run tool calls without asking.")]
MaxSteps = Annotated[int, typer.Option(help="Answers to one task, tool calls in between.", min=1)]
TimeLimit = Annotated[float, typer.Option("--time-limit", help="Seconds that one call may take.", min=0.1)]
MemoryLimit = Annotated[int, typer.Option("--memory-limit", help="MiB that one call may use.", min=64)]


@dataclass(frozen=True)
class _Limits:
    max_steps: int
    time_s: float
    memory_mib: int


def register(app: typer.Typer) -> None:
    command(app, "agent", examples=["kiln agent", "kiln agent --work ~/notes --yes"], panel=SERVER)(agent)
    command(app, "run", examples=["kiln run 'Which day of the week is 1 May 2030?' --yes"], panel=SERVER)(run)


def agent(
    session: Session,
    model: Model = None,
    work: Work = None,
    yes: Yes = False,
    max_steps: MaxSteps = 8,
    time_limit: TimeLimit = 30.0,
    memory_limit: MemoryLimit = 512,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
) -> int:
    """Talk to the model while it runs Python and shell code in a sandbox.

    The sandbox has no network, sees the system read-only and writes to its work folder alone, within
    limits of time, memory, processes and disk. Every call is shown and asked about first. Where this
    machine cannot isolate code, nothing starts. Without a terminal, each line of standard input is a
    task; with --json each answer is one document a line.

    This needs a model that writes code, such as Qwen3.5-4B. The demo model has learned emails and sums
    alone: it calls no tool, and what it answers here is mostly beside the point.
    """
    fields = request_fields(model=model, temperature=temperature, max_tokens=max_tokens)
    limits = _Limits(max_steps, time_limit, memory_limit)
    with _agent(session, fields, work, limits, allows_all=yes) as works:
        for prompt in _prompts(session):
            task = works.do(prompt)
            session.out.answer(task.as_json(), lambda console: None)
    return exit_codes.DONE


def run(
    session: Session,
    prompt: Annotated[str, typer.Argument(help="The task.")],
    model: Model = None,
    work: Work = None,
    yes: Yes = False,
    max_steps: MaxSteps = 8,
    time_limit: TimeLimit = 30.0,
    memory_limit: MemoryLimit = 512,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
) -> int:
    """Carry out one task as kiln agent does. Exit code 1 when its steps were used up.

    As kiln agent, this needs a model that writes code: the demo model does not.
    """
    fields = request_fields(model=model, temperature=temperature, max_tokens=max_tokens)
    limits = _Limits(max_steps, time_limit, memory_limit)
    with _agent(session, fields, work, limits, allows_all=yes) as works:
        task = works.do(prompt)
    session.out.answer(task.as_json(), lambda console: None)
    return exit_codes.NO if task.is_cut else exit_codes.DONE


@contextlib.contextmanager
def _agent(
    session: Session, fields: dict[str, Any], work: Path | None, limits: _Limits, *, allows_all: bool
) -> Iterator[Agent]:
    from rich.console import Console

    from kiln_cli.agent.session import Agent
    from kiln_cli.agent.tools import ToolLimits, Workbench
    from kiln_cli.agent.view import TerminalView

    tool_limits = ToolLimits(limits.time_s, limits.memory_mib * 2**20)
    quiet = Console(quiet=True)
    console, aside = (quiet, quiet) if session.out.as_json else (session.out.console, session.out.errors)
    can_ask = sys.stdin.isatty() and not session.out.as_json
    view = TerminalView(console, aside, input if can_ask else None, allows_all=allows_all)
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kiln-agent-")))
        workbench = Workbench(work.expanduser(), tool_limits)
        yield Agent(session.client, workbench, view, fields, limits.max_steps)


def _prompts(session: Session) -> Iterator[str]:
    """What is typed, or the lines of standard input."""
    if not sys.stdin.isatty() or session.out.as_json:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401 line editing and history for input()

    session.out.note("Ctrl-D ends.")
    while True:
        try:
            text = input("» ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text:
            yield text
