"""`kiln bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kiln_cli import exit_codes
from kiln_cli.chat.sampling import Model
from kiln_cli.session import SERVER, Session, command

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    examples = ["kiln bench", "kiln bench --requests 8 --concurrency 4 --max-tokens 16 --json"]
    command(app, "bench", examples=examples, panel=SERVER)(bench)


def bench(
    session: Session,
    requests: Annotated[int, typer.Option("--requests", "-n", help="How many in all.", min=1)] = 32,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", help="How many at any moment.", min=1, max=1024)
    ] = 8,
    prompt_words: Annotated[int, typer.Option(help="Words of each prompt.", min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 64,
    model: Model = None,
) -> int:
    """Measure a running server: tokens a second, time to the first token, time between tokens.

    This process and the server share a machine's cores when they share the machine. Exit code 1 when a
    request failed. In a clone of the repository, make bench measures kernels and the engine as well.
    """
    from kiln_cli.bench.load import Load, run

    found = run(
        session.client.base_url,
        session.api_key,
        Load(requests, min(concurrency, requests), prompt_words, max_tokens, model),
    )
    session.out.answer(found, lambda console: _show(console, found))
    return exit_codes.NO if found["failed"] else exit_codes.DONE


def _show(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"{found['output_tokens_per_s']:,} tokens/s  {found['requests_per_s']} requests/s  "
        f"({found['output_tokens']:,} tokens in {found['seconds']:.1f} s)"
    )
    for name, label in (("first_token_ms", "first token"), ("between_tokens_ms", "between tokens")):
        if found[name]:
            shown = "  ".join(f"{rank} {value:g} ms" for rank, value in found[name].items())
            console.print(f"{label:<15} {shown}")
    if found["failed"]:
        console.print(
            f"{found['failed']} of {found['requests']} requests failed: {found['first_error']}", markup=False
        )
