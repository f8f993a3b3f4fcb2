"""`kiln models …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kiln_cli.session import Session, command

app = typer.Typer(
    help="What a request may name as its model; fetch models from the hub.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@command(app, "list", examples=["kiln models list"])
def list_(session: Session) -> None:
    """List what a request may put in `model`: the base model, adapters and their versions."""
    models = session.client.models()
    names = "\n".join(model["id"] for model in models)
    session.out.answer(models, lambda console: console.print(names, markup=False))


@command(app, "pull", examples=["kiln models pull Qwen/Qwen3.5-0.8B"], asks_server=False)
def pull(
    session: Session,
    model_id: Annotated[str, typer.Argument(help="owner/name at the hub.", metavar="MODEL")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. The newest when left out.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="A folder instead of the hub's cache.", show_default=False)
    ] = None,
) -> None:
    """Fetch a model from the hub, and check every file's hash. HF_ENDPOINT names another hub.

    Prints the folder, which kiln up --model takes.
    """
    import os

    if session.out.as_json or not session.out.errors.is_terminal:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from kiln_cli.hub.pull import pull as fetch

    found = fetch(
        model_id, revision, target, lambda name, number, count: session.out.note(f"{number}/{count} {name}")
    )
    session.out.answer(found, lambda console: console.print(found["folder"], markup=False, soft_wrap=True))
