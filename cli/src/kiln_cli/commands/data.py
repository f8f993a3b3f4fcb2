"""`kiln data …`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kiln_cli.session import Session, command

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Data sets kept on the server.", no_args_is_help=True, rich_markup_mode="rich")

DatasetId = Annotated[str, typer.Argument(help="The data set's id.")]


@command(app, "upload", examples=["kiln data upload examples.jsonl --name examples"])
def upload(
    session: Session,
    file: Annotated[
        Path,
        typer.Argument(
            help='JSONL of {"messages": […]} and {"prompt", "completion"}, or of groups of scored answers: '
            '{"prompt", "completions": [{"text", "reward"}]}.'
        ),
    ],
    name: Annotated[str, typer.Option(help="The file's name when left out.", show_default=False)] = "",
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="chat, prompt_completion, mixed or rollouts. The rows decide when left out.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Upload training data. A broken row refuses all, and every broken line is named.

    Prints the id that --dataset of kiln train sft and kiln train grpo takes.
    """
    from kiln_cli.errors import FileUnreadable

    try:
        kept = session.client.datasets.upload(file, name=name or file.stem, format=format_)
    except OSError as error:
        raise FileUnreadable(f"{file} cannot be read: {error.strerror}") from None
    session.out.answer(kept, lambda console: console.print(kept["id"], markup=False))
    session.out.note(f"{kept['rows']:,} rows of {kept['format']}")


@command(app, "list", examples=["kiln data list"])
def list_(session: Session) -> None:
    """List the data sets, the newest first."""
    found = session.client.datasets.list()
    session.out.answer(found, lambda console: _show(console, found))


@command(app, "show", examples=["kiln data show DATASET --rows 2"])
def show(
    session: Session,
    dataset_id: DatasetId,
    rows: Annotated[int, typer.Option("--rows", "-n", help="How many are drawn.", min=1, max=1000)] = 5,
    seed: Annotated[int, typer.Option(help="Another draws others.", min=0)] = 0,
) -> None:
    """Show some rows of a data set, drawn at random."""
    found = session.client.datasets.get(dataset_id)
    sample = list(session.client.datasets.sample(dataset_id, rows, seed))
    lines = [json.dumps(row, ensure_ascii=False) for row in sample]
    session.out.answer(
        {**found, "sample": sample}, lambda console: console.print("\n".join(lines), markup=False)
    )


@command(app, "rm", examples=["kiln data rm DATASET --yes"])
def rm(
    session: Session,
    dataset_id: DatasetId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a data set for good. Jobs that were made of it keep their own copy."""
    from kiln_cli.confirm import confirm

    confirm(f"Delete {dataset_id} for good?", yes)
    answer = session.client.datasets.delete(dataset_id)
    session.out.answer(answer, lambda console: console.print(f"{dataset_id} deleted", markup=False))


def _show(console: Console, found: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kiln_cli.adapters.tables import size
    from kiln_cli.status import duration

    if not found:
        console.print("no data sets yet; kiln data upload FILE")
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("data set", "name", "format", "rows", "size", "age"):
        table.add_column(name, no_wrap=name == "data set", overflow="fold")
    for entry in found:
        table.add_row(
            escape(entry["id"]),
            escape(entry.get("name") or ""),
            escape(entry["format"]),
            f"{entry['rows']:,}",
            size(entry["bytes"]),
            duration(max(time.time() - entry["created_at"], 0)),
        )
    console.print(table)
