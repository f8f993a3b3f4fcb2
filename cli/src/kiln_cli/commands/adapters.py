"""`kiln adapters …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kiln_cli.completion import complete_adapter
from kiln_cli.session import Session, command

app = typer.Typer(
    help="Adapters: what there is, which one answers, and how it got there.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Name = Annotated[str, typer.Argument(help="The adapter.", autocompletion=complete_adapter)]
Reference = Annotated[
    str, typer.Argument(help="A name (its latest version) or name@version.", autocompletion=complete_adapter)
]


@command(app, "list", examples=["kiln adapters list", "kiln adapters list --json"])
def list_(session: Session) -> None:
    """List adapters; the attached one answers for the base model's id."""
    from kiln_cli.adapters.tables import show_adapters

    adapters = session.client.adapters.list()
    session.out.answer(
        [adapter.raw for adapter in adapters], lambda console: show_adapters(console, adapters)
    )


@command(app, "show", examples=["kiln adapters show polite"])
def show(session: Session, name: Name) -> None:
    """Show an adapter's versions: where each came from and what its job measured."""
    from kiln_cli.adapters.tables import show_adapter

    adapter = session.client.adapters.get(name)
    session.out.answer(adapter.raw, lambda console: show_adapter(console, adapter))


@command(app, "attach", examples=["kiln adapters attach polite", "kiln adapters attach polite@1"])
def attach(session: Session, reference: Reference) -> None:
    """Let an adapter answer by default, from the next request on."""
    from kiln_cli.adapters.references import parse

    answer = session.client.adapters.attach(*parse(reference))
    session.out.answer(
        answer, lambda console: console.print(f"{answer['attached']['id']} answers", markup=False)
    )


@command(app, "detach", examples=["kiln adapters detach"])
def detach(session: Session) -> None:
    """Let the bare base model answer by default again."""
    answer = session.client.adapters.detach()
    session.out.answer(answer, lambda console: console.print("the bare base model answers"))


@command(app, "rollback", examples=["kiln adapters rollback polite@1"])
def rollback(
    session: Session,
    reference: Annotated[
        str, typer.Argument(help="name@version to go back to.", autocompletion=complete_adapter)
    ],
) -> None:
    """Go back to an older version in one call, from the next request on."""
    from kiln_cli.adapters.references import parse_version

    name, version = parse_version(reference)
    answer = session.client.adapters.rollback(name, version)
    session.out.answer(answer, lambda console: console.print(f"{name}@{version} is back", markup=False))


@command(app, "diff", examples=["kiln adapters diff polite --from 1 --to 2"])
def diff(
    session: Session,
    name: Name,
    from_version: Annotated[
        int | None, typer.Option("--from", help="The parent when left out.", min=1, show_default=False)
    ] = None,
    to_version: Annotated[
        int | None, typer.Option("--to", help="The latest when left out.", min=1, show_default=False)
    ] = None,
) -> None:
    """Compare two versions: norms layer by layer, and how far one has moved from the other."""
    from kiln_cli.adapters.tables import show_diff

    answer = session.client.adapters.diff(name, from_version, to_version)
    session.out.answer(answer, lambda console: show_diff(console, answer))


@command(app, "merge", examples=["kiln adapters merge polite=0.5 student=0.5 --output blend"])
def merge(
    session: Session,
    sources: Annotated[list[str], typer.Argument(help="Adapters with their weights: NAME=WEIGHT.")],
    *,
    output: Annotated[str, typer.Option("--output", "-o", help="Name to publish the result under.")],
    mode: Annotated[str, typer.Option(help="linear, ties or concat.")] = "linear",
) -> None:
    """Make one new adapter out of several."""
    from kiln_cli.adapters.references import parse_weights

    answer = session.client.adapters.merge(parse_weights(sources), output, mode=mode)
    session.out.answer(answer, lambda console: console.print(answer["id"], markup=False))


@command(app, "pull", examples=["kiln adapters pull polite", "kiln adapters pull polite@1 -o first.tar.gz"])
def pull(
    session: Session,
    reference: Reference,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="NAME.tar.gz when left out.", show_default=False),
    ] = None,
) -> None:
    """Download an adapter as a .tar.gz of a PEFT folder, checked by its hash."""
    from kiln_cli.adapters.files import download

    found = download(session.client, reference, output)
    session.out.answer(found, lambda console: console.print(found["file"], markup=False))


@command(app, "push", examples=["kiln adapters push polite.tar.gz --name polite-copy"])
def push(
    session: Session,
    source: Annotated[Path, typer.Argument(help="A PEFT folder, or a .tar.gz of one.")],
    *,
    name: Annotated[str, typer.Option(help="Name to publish under; a new version.")],
    attach: Annotated[bool, typer.Option("--attach", help="Let it answer by default.")] = False,
) -> None:
    """Upload a PEFT adapter as a new version of a name."""
    from kiln_cli.adapters.files import upload

    version = upload(session.client, source, name, attach)
    session.out.answer(version.raw, lambda console: console.print(version.id, markup=False))


@command(app, "rm", examples=["kiln adapters rm polite-copy --yes"])
def rm(
    session: Session,
    reference: Annotated[
        str,
        typer.Argument(
            help="A name with all its versions, or name@version.", autocompletion=complete_adapter
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete an adapter or one version of it, for good. Refused while it is attached."""
    from kiln_cli.confirm import confirm

    confirm(f"Delete {reference} for good?", yes)
    answer = session.client.adapters.delete(reference)
    session.out.answer(
        answer,
        lambda console: console.print(f"{reference}: {answer['versions']} versions deleted", markup=False),
    )
