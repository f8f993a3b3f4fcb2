"""Options of `kiln chat` and `kiln complete` as fields of a request."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kiln_cli.completion import complete_model

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--adapter",
        "-m",
        help="Who answers: an adapter, name@version, or base. The attached default when left out.",
        show_default=False,
        autocompletion=complete_model,
    ),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", min=0, max=2, show_default=False)]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer.", min=1, show_default=False)]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same answer.", show_default=False)]


def request_fields(**given: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in given.items() if value is not None}
