"""Where the part of a prompt ends that conversations have in common: system message and tools."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kiln_common.text.chat_template import TemplateRefused

TURN_MARK = "<|im_start|>"
_NUM_REMEMBERED = 64
# Two first turns; what their renderings share does not depend on what a user says.
_FIRST_TURNS = ({"role": "user", "content": "x"}, {"role": "user", "content": "y"})

Render = Callable[[Sequence[dict[str, Any]]], str]


class SharedPrefixes:
    """Remembers the rendered prefix of each recent pair of instructions and tools.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prefixes: OrderedDict[bytes, str] = OrderedDict()

    def num_characters(
        self,
        text: str,
        instructions: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        render: Render,
    ) -> int:
        """How many leading characters of the rendered prompt `text` end before its first turn.

        `instructions` are the system message, or nothing; `render` renders messages with the
        prompt's own tools and variables. 0 when the template does not render a first turn apart.
        """
        key = hashlib.sha256(json.dumps([instructions, tools, variables]).encode()).digest()
        with self._lock:
            prefix = self._prefixes.get(key)
        if prefix is None or not text.startswith(prefix):  # a template may render today's date
            prefix = _render_prefix(instructions, render)
        with self._lock:
            self._prefixes[key] = prefix
            self._prefixes.move_to_end(key)
            if len(self._prefixes) > _NUM_REMEMBERED:
                self._prefixes.popitem(last=False)
        return len(prefix) if text.startswith(prefix) else 0


def _render_prefix(instructions: Sequence[dict[str, Any]], render: Render) -> str:
    try:
        first, second = (render([*instructions, turn]) for turn in _FIRST_TURNS)
    except TemplateRefused:
        return ""
    common = first[: num_common_characters(first, second)]
    return common[: max(common.rfind(TURN_MARK), 0)]


def num_common_characters(first: str, second: str) -> int:
    """How many leading characters two texts share."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
