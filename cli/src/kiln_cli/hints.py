"""Hints of the server in the words of the command: they name routes, and here one types commands."""

from __future__ import annotations

import re

# Longer ones first where one begins with another.
_COMMANDS = {
    "GET /v1/evals/runs/{id}": "kiln eval show RUN",
    "GET /v1/evals/runs": "kiln eval list",
    "GET /v1/evals/suites": "kiln eval suites",
    "POST /v1/train/jobs/{id}/retry": "kiln train retry JOB",
    "GET /v1/train/jobs": "kiln train status",
    "POST /v1/adapters/detach": "kiln adapters detach",
    "GET /v1/adapters": "kiln adapters list",
    "GET /v1/datasets": "kiln data list",
    "GET /v1/models": "kiln models list",
    "GET /readyz": "kiln status",
    "Send Authorization: Bearer KEY with a key that was configured": (
        "Give a key that was configured with --api-key KEY or KILN_API_KEY"
    ),
    "Use a new Idempotency-Key": "Use a new --idempotency-key",
}
_KNOWN = re.compile("|".join(f"({re.escape(text)})( lists)?" for text in _COMMANDS))


def in_words_of_the_command(hint: str) -> str:
    """`hint` with each route that has a command replaced by it."""
    return _KNOWN.sub(_command, hint)


def _command(found: re.Match[str]) -> str:
    text = next(group for group in found.groups() if group)
    return _COMMANDS[text] + (" shows" if found[0].endswith(" lists") else "")
