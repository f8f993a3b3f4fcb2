"""What every command shares: --json, the server's address, and errors that become exit codes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from kiln_cli import exit_codes
from kiln_cli.hints import in_words_of_the_command
from kiln_cli.output import Output
from kiln_cli.server import Server, find_server
from kiln_common.errors import KilnError

if TYPE_CHECKING:
    import kiln

# Where the list of commands shows a command.
MACHINE, SERVER, LEARNING = "This machine", "A running server", "Learning"

Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON document.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="The server.",
        envvar="KILN_URL",
        show_default="that of your kiln up, or http://127.0.0.1:8420",
        metavar="URL",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="A key of the server.", envvar="KILN_API_KEY", show_default=False),
]


class Session:
    """One run of a command: where its answer goes, and the server it talks to."""

    def __init__(
        self, out: Output, url: str | None, api_key: str | None, state_dir: Path | None = None
    ) -> None:
        self.out = out
        self.api_key = api_key
        self._given = url, state_dir

    @functools.cached_property
    def server(self) -> Server:
        return find_server(*self._given)

    @functools.cached_property
    def client(self) -> kiln.Client:
        import kiln  # httpx takes a moment, and `kiln --help` needs none of it

        return kiln.Client(self.server.url, api_key=self.api_key)

    def hint_of(self, error: kiln.KilnError) -> str:
        """What to do about an error of the client, in the words of the command."""
        if error.code == "connection_failed":
            return f"{self.server.why} kiln up starts a server; --url or KILN_URL names another."
        return in_words_of_the_command(error.hint)


def command(
    app: typer.Typer,
    name: str,
    *,
    examples: Sequence[str],
    asks_server: bool = True,
    panel: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `function(session, …options)` as a command with --json and, unless told not to, --url and
    --api-key. The function's docstring is the help; `examples` are run by the tests as they stand.

    The function returns its exit code, or None for 0. Errors of ours and of the client become a line
    with a hint and an exit code.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(
            *, as_json: bool = False, url: str | None = None, api_key: str | None = None, **given: Any
        ) -> None:
            session = Session(Output(as_json), url, api_key, given.get("state_dir"))
            raise typer.Exit(run_reporting(session, lambda: function(session, **given)))

        extra: dict[str, tuple[Any, Any]] = {"as_json": (Json, False)}
        if asks_server:
            extra |= {"url": (Url, None), "api_key": (ApiKey, None)}
        _give_signature(run, function, extra)
        text = unfolded(inspect.cleandoc(function.__doc__ or ""))
        shown = "\n".join(f"\n[bold]{example}[/bold]" for example in examples)
        label = "Example:" if len(examples) == 1 else "Examples:"
        app.command(
            name,
            help=f"{text}\n\n{label}\n{shown}",
            short_help=first_sentence(text),
            rich_help_panel=panel,
        )(run)
        return function

    return register


def unfolded(text: str) -> str:
    """Each paragraph on one line: the terminal breaks it where its own lines end."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def first_sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."


def run_reporting(session: Session, work: Callable[[], Any]) -> int:
    """The exit code of `work`, whose errors are shown."""
    out = session.out
    try:
        return work() or exit_codes.DONE
    except KilnError as error:
        out.error(error.code, str(error), error.hint)
        return exit_codes.of_own_error(error)
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except Exception as error:
        import kiln

        if not isinstance(error, kiln.KilnError):
            raise
        details: dict[str, Any] = {}
        if isinstance(error, kiln.ApiError):
            details = {"param": error.param} | ({"details": error.details} if error.details else {})
        message, hint = in_words_of_the_command(error.message), session.hint_of(error)
        out.error(error.code, message, hint, getattr(error, "request_id", None), **details)
        return exit_codes.of_client_error(error)


def _give_signature(
    run: Callable[..., Any], function: Callable[..., Any], extra: dict[str, tuple[Any, Any]]
) -> None:
    """Typer reads options off the signature: the function's own without `session`, then the shared ones."""
    hints = get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in own
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in extra.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
