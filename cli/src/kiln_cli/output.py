"""How commands answer: text for people, or one JSON document for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_FILES = 250


def _console(stderr: bool) -> Console:
    """Where nobody looks at columns, lines are not folded: whoever greps wants an id whole."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else _WIDTH_OF_FILES)


class Output:
    """Standard output carries the answer and nothing else; notes and progress go to standard error."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.about: dict[str, Any] = {}  # what an error object says besides, such as the job it is about
        self._console: Console | None = None
        self._errors: Console | None = None

    @property
    def console(self) -> Console:
        if self._console is None:
            self._console = _console(stderr=False)
        return self._console

    @property
    def errors(self) -> Console:
        if self._errors is None:
            self._errors = _console(stderr=True)
        return self._errors

    def answer(self, value: Any, show: Callable[[Console], None]) -> None:
        """`value` as one line of JSON, or what `show` prints."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            show(self.console)

    def note(self, text: str) -> None:
        """A line beside the answer; not among JSON."""
        if not self.as_json:
            self.errors.print(text, style="dim", markup=False, soft_wrap=True)

    def warn(self, texts: Iterable[str]) -> None:
        """Lines beside the answer that should be seen; not among JSON, which has them in the answer."""
        if not self.as_json:
            for text in texts:
                self.errors.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def error(
        self, code: str, message: str, hint: str = "", request_id: str | None = None, **details: Any
    ) -> None:
        """Why there is no answer; with --json as the same object that the server's errors have."""
        if self.as_json:
            body = {"code": code, "message": message, "hint": hint or None, "request_id": request_id}
            sys.stdout.write(json.dumps({"error": body | details | self.about}, ensure_ascii=False) + "\n")
            return
        from rich.markup import escape

        self.errors.print(f"[red]{escape(code)}[/red]: {escape(message)}", soft_wrap=True)
        if hint:
            self.errors.print(f"  {escape(hint)}", style="dim", soft_wrap=True)
        if request_id:
            self.errors.print(f"  request {escape(request_id)}", style="dim", soft_wrap=True)
