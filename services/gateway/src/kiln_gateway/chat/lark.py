"""Pieces of a Lark grammar, as llguidance reads it."""

from __future__ import annotations

import json
import re
from typing import Any

from kiln_common.errors import GrammarTooLarge
from kiln_common.json_grammar import MOST_GRAMMAR_BYTES

_MOST_ALTERNATIVES = 16_384


class LarkRules:
    """Rules under construction, each under a name of its own.

    They stay below what the engine compiles: `add` and `add_terminal` raise GrammarTooLarge, which
    names the request's field `param`.
    """

    def __init__(self, param: str) -> None:
        self._param = param
        self._lines: list[str] = []
        self._num_bytes = 0
        self._num_alternatives = 0

    def add(self, body: str, *, is_lazy: bool = False) -> str:
        """Add a rule; returns its name. A lazy one is a single expression that ends as early as it can."""
        name = f"rule_{len(self._lines)}"
        self._append(f"{name}{'[lazy]' if is_lazy else ''}: {body}")
        return name

    def add_terminal(self, body: str) -> str:
        """Add an expression; returns its name."""
        name = f"TERMINAL_{len(self._lines)}"
        self._append(f"{name}: {body}")
        return name

    def count_alternative(self, param: str) -> None:
        """One more alternative is looked at: a few that refer to each other can make any number.

        Raises:
            GrammarTooLarge: there are too many; names the field `param`.
        """
        self._num_alternatives += 1
        if self._num_alternatives > _MOST_ALTERNATIVES:
            raise GrammarTooLarge(
                f"the schemas have more than {_MOST_ALTERNATIVES} alternatives", param=param
            )

    def _append(self, line: str) -> None:
        self._num_bytes += len(line.encode()) + 1
        if self._num_bytes > MOST_GRAMMAR_BYTES:
            raise GrammarTooLarge(f"the grammar has more than {MOST_GRAMMAR_BYTES} bytes", param=self._param)
        self._lines.append(line)

    def text(self, start: str) -> str:
        """The whole grammar, with `start` as the body of its start rule."""
        return "\n".join([f"start: {start}", *self._lines]) + "\n"


def literal(text: str) -> str:
    """Exactly this text."""
    return json.dumps(text, ensure_ascii=False)


def expression(regex: str) -> str:
    """A regular expression between slashes."""
    escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], regex, flags=re.DOTALL)
    return "/" + escaped.replace("\n", r"\n") + "/"


def one_of(bodies: list[str]) -> str:
    return bodies[0] if len(bodies) == 1 else "(" + " | ".join(bodies) + ")"


def json_value(schema: Any, options: dict[str, Any]) -> str:
    """JSON text that the schema allows, which becomes the body of a rule of its own."""
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": options}
    return "%json " + json.dumps(schema, ensure_ascii=False)
