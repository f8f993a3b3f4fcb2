"""`kiln eval …`."""

from __future__ import annotations

from typing import Annotated

import typer

from kiln_cli import exit_codes
from kiln_cli.chat.sampling import MaxTokens, Model, Seed, Temperature, request_fields
from kiln_cli.completion import complete_model
from kiln_cli.session import Session, command

app = typer.Typer(
    help="Measure adapter versions on suites of cases.", no_args_is_help=True, rich_markup_mode="rich"
)

Suite = Annotated[str, typer.Argument(help="A suite's name, name@version, or a .jsonl file of cases.")]


@command(
    app, "run", examples=["kiln eval run sums.jsonl --model base", "kiln eval run sums --min-score 0 --json"]
)
def run(
    session: Session,
    suite: Suite,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    min_score: Annotated[
        float | None, typer.Option(help="Exit code 1 when the score is lower.", show_default=False)
    ] = None,
    cases: Annotated[bool, typer.Option("--cases", help="Show every answer and its score.")] = False,
) -> int:
    """Run a suite against whoever answers, and say the score with its 95 % interval.

    A file is kept on the server under its own name first; the same cases again are the same version.
    """
    from kiln_cli.evals.runs import run_to_end, show_run, suite_reference

    sampling = request_fields(max_tokens=max_tokens, temperature=temperature, seed=seed)
    found = run_to_end(session, suite_reference(session.client, suite), model, sampling)
    if cases:
        found.refresh(cases=True)
    session.out.answer(found.raw, lambda console: show_run(console, found.raw))
    is_below = min_score is not None and (found.score or {}).get("mean", 0.0) < min_score
    return exit_codes.NO if is_below else exit_codes.DONE


@command(
    app,
    "compare",
    examples=["kiln eval compare base polite --suite sums", "kiln eval compare RUN_1 RUN_2 --fail-if-worse"],
)
def compare(
    session: Session,
    baseline: Annotated[
        str,
        typer.Argument(help="With --suite an adapter, else a run's id.", autocompletion=complete_model),
    ],
    candidate: Annotated[str, typer.Argument(help="The same.", autocompletion=complete_model)],
    suite: Annotated[
        str | None, typer.Option(help="Run this suite against both first.", show_default=False)
    ] = None,
    max_tokens: MaxTokens = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit code 1 when the candidate is surely worse.")
    ] = False,
) -> int:
    """Compare two versions on the same cases, and say how sure the difference is."""
    from kiln_cli.evals.runs import is_worse, run_to_end, show_comparison, suite_reference

    if suite is not None:
        reference = suite_reference(session.client, suite)
        sampling = request_fields(max_tokens=max_tokens)
        baseline, candidate = (
            run_to_end(session, reference, model, sampling).id for model in (baseline, candidate)
        )
    found = session.client.evals.compare(baseline, candidate)
    session.out.answer(found, lambda console: show_comparison(console, found))
    return exit_codes.NO if fail_if_worse and is_worse(found) else exit_codes.DONE


@command(app, "show", examples=["kiln eval show RUN_1 --cases"])
def show(
    session: Session,
    run_id: Annotated[str, typer.Argument(help="A run's id.")],
    cases: Annotated[bool, typer.Option("--cases", help="Show every answer and its score.")] = False,
) -> None:
    """Show a run: how far it is, its score, its cases."""
    from kiln_cli.evals.runs import show_run

    found = session.client.evals.get_run(run_id, cases=cases).raw
    session.out.answer(found, lambda console: show_run(console, found))


@command(app, "list", examples=["kiln eval list", "kiln eval list --model polite --limit 5"])
def list_(
    session: Session,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--adapter",
            "-m",
            help="Only runs on this adapter, name@version, or base.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many runs are listed.", min=1, max=500)] = 20,
) -> None:
    """List the runs, the newest first."""
    from kiln_cli.evals.runs import show_runs

    found = [run.raw for run in session.client.evals.runs(model, limit=limit)]
    session.out.answer(found, lambda console: show_runs(console, found))


@command(app, "rm", examples=["kiln eval rm RUN --yes"])
def rm(
    session: Session,
    run_id: Annotated[str, typer.Argument(help="A run's id.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run with its answers for good. One that is not over ends."""
    from kiln_cli.confirm import confirm

    confirm(f"Delete {run_id} for good?", yes)
    answer = session.client.evals.delete_run(run_id)
    session.out.answer(answer, lambda console: console.print(f"{run_id} deleted", markup=False))


@command(app, "suites", examples=["kiln eval suites"])
def suites(session: Session) -> None:
    """List the suites that the server keeps."""
    found = session.client.evals.suites()
    lines = [f"{entry['name']}@{entry['version']}  {entry['num_cases']} cases" for entry in found]
    session.out.answer(
        found, lambda console: console.print("\n".join(lines) or "no suites yet", markup=False)
    )
