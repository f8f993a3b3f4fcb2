"""Suites from files, runs to their end, and how scores are shown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kiln
from kiln_cli.errors import FileUnreadable
from kiln_cli.session import Session
from kiln_cli.status import duration


def suite_reference(client: kiln.Client, suite: str) -> str:
    """A suite's name as it is; a file (it ends in .jsonl) is sent first, under its own name.

    Raises:
        FileUnreadable: there is no such file, or it is not UTF-8 text.
    """
    if not suite.endswith(".jsonl"):
        return suite
    path = Path(suite).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileUnreadable(f"{suite} cannot be read: {reason}") from None
    kept = client.evals.put_suite(path.stem, text)
    return f"{kept['name']}@{kept['version']}"


def run_to_end(session: Session, suite: str, model: str | None, sampling: dict[str, Any]) -> kiln.EvalRun:
    """Start a run and wait for it, its progress beside the answer."""
    run = session.client.evals.run(suite, model, **sampling)
    errors = session.out.errors
    if session.out.as_json or not errors.is_terminal:
        return run.wait()
    with errors.status(f"{escape(run.raw['adapter'])} on {escape(suite)}") as status:

        def show(done: int, cases: int) -> None:
            status.update(f"{escape(run.raw['adapter'])} on {escape(suite)}: {done} of {cases} cases")

        return run.wait(on_progress=show)


def show_runs(console: Console, runs: list[dict[str, Any]]) -> None:
    if not runs:
        console.print("no such runs; kiln eval run --help has an example")
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("run", "suite", "adapter", "status", "cases", "score", "age"):
        table.add_column(name, no_wrap=name == "run", overflow="fold")
    for run in runs:
        table.add_row(
            escape(run["id"]),
            f"{escape(run['suite']['name'])}@{run['suite']['version']}",
            escape(run["adapter"]),
            escape(run["status"]),
            f"{run['progress']['done']} of {run['progress']['cases']}",
            interval(run["score"]) if run["score"] else "",
            duration(max(time.time() - run["created_at"], 0)),
        )
    console.print(table)


def show_run(console: Console, run: dict[str, Any]) -> None:
    """Its score with the interval, and each scorer's; cases where it has them."""
    suite = run["suite"]
    console.print(
        f"[bold]{escape(run['adapter'])}[/bold] on {escape(suite['name'])}@{suite['version']}"
        f"  {escape(run['id'])}  {escape(run['status'])}"
    )
    if run.get("score"):
        console.print(f"  score {interval(run['score'])}", markup=False)
    if run.get("num_invalid"):
        console.print(
            f"  {run['num_invalid']} answers had not the form that was asked for, and count as wrong"
        )
    for name, entry in (run.get("by_scorer") or {}).items():
        console.print(f"  {name:<16} {interval(entry)}  ({entry['num_cases']} cases)", markup=False)
    if run.get("cases"):
        console.print(_case_table(run["cases"]))


def _case_table(cases: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("case", "score", "answer", "why"):
        table.add_column(name, overflow="fold")
    for case in cases:
        colour = "green" if case["score"] >= 1 else "red" if case["score"] <= 0 else "yellow"
        answer = " ".join(case["answer"].split())[:80]
        table.add_row(
            str(case["index"]), f"[{colour}]{case['score']:.2g}[/]", escape(answer), escape(case["detail"])
        )
    return table


def show_comparison(console: Console, found: dict[str, Any]) -> None:
    for side in ("baseline", "candidate"):
        console.print(
            f"{side:<10} {found[side]['adapter']:<20} {interval(found[side]['score'])}", markup=False
        )
    console.print(f"difference {'':<20} {interval(found['difference'], sign='+')}", markup=False)
    console.print(
        f"{found['num_better']} better, {found['num_worse']} worse, {found['num_same']} the same; "
        f"p = {found['p_value']:.3g} ({found['test']})",
        markup=False,
    )


def interval(value: dict[str, Any], sign: str = "") -> str:
    """A mean and where it lies at the stated confidence."""
    return f"{value['mean']:{sign}.3f} ({value['low']:{sign}.3f} to {value['high']:{sign}.3f})"


def is_worse(found: dict[str, Any]) -> bool:
    """Whether the candidate's whole interval lies below no difference."""
    return found["difference"]["high"] < 0
