"""The agent's tools: Python and shell code, run in the sandbox and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiln_cli.errors import AgentNotAvailable

_MOST_ANSWERED_CHARACTERS = 8000

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The whole program."}},
                "required": ["code"],
                "additionalProperties": False,
            },
        },
    }
    for name, description in (
        ("python", "Run a Python program and return what it prints. Its folder is kept between calls."),
        ("shell", "Run shell commands and return what they print. Their folder is kept between calls."),
    )
]


@dataclass(frozen=True)
class ToolLimits:
    """What one call may use."""

    time_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What a call came to, as the model and the JSON answer see it."""

    exit_code: int | None
    output: str
    stopped: str | None  # the limit that ended it

    def as_json(self) -> dict[str, Any]:
        return {"exit_code": self.exit_code, "output": self.output, "stopped": self.stopped}

    def for_model(self) -> str:
        ended = f"\n[ended: {self.stopped}]" if self.stopped else ""
        failed = f"\n[exit code {self.exit_code}]" if self.exit_code else ""
        return (self.output or "[no output]") + ended + failed


class Workbench:
    """Runs tool calls in one work folder, the only place where they may write.

    Raises, when it is made:
        AgentNotAvailable: this installation has no sandbox.
        SandboxUnavailable: this machine cannot isolate code.
    """

    def __init__(self, folder: Path, limits: ToolLimits) -> None:
        if importlib.util.find_spec("kiln_common.sandbox") is None:
            raise AgentNotAvailable("kiln agent is not available: this installation has no sandbox")
        self._sandbox = importlib.import_module("kiln_common.sandbox")
        self._folder = folder
        self._limits = self._sandbox.Limits(time_s=limits.time_s, memory_bytes=limits.memory_bytes)
        self._sandbox.run(":", self._sandbox.Language.SHELL, folder, self._limits)

    def run(self, tool: str, code: str) -> Outcome:
        """`tool` is python or shell."""
        result = self._sandbox.run(code, self._sandbox.Language(tool), self._folder, self._limits)
        output = "\n".join(text.rstrip() for text in (result.stdout, result.stderr) if text.strip())
        if len(output) > _MOST_ANSWERED_CHARACTERS:
            cut = len(output) - _MOST_ANSWERED_CHARACTERS
            output = f"{output[:_MOST_ANSWERED_CHARACTERS]}\n[{cut} more characters]"
        return Outcome(result.exit_code, output, result.message or None)


def code_of(call: dict[str, Any]) -> tuple[str, str] | str:
    """Tool and code of a call; or, as text for the model, why it is none of ours."""
    function = call["function"]
    names = [tool["function"]["name"] for tool in TOOLS]
    if function["name"] not in names:
        return f"there is no tool {function['name']!r}; there are {', '.join(names)}"
    try:
        code = json.loads(function["arguments"])["code"]
    except (ValueError, KeyError, TypeError) as error:
        return f"the arguments are not an object with `code`: {error}"
    return (function["name"], code) if isinstance(code, str) else "`code` is not text"
