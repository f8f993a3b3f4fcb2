"""docs/cli.md: the page of the `kiln` command, from the command's own help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

INTRO = """# The kiln command

`kiln` runs a server on this machine (`kiln up`) and does everything one can ask of a running one. Commands that talk to a server take `--url` (or `KILN_URL`; when neither is given, the address of the `kiln up` that has its state in `~/.local/state/kiln` or `KILN_STATE_DIR`, else `http://127.0.0.1:8420`) and `--api-key` (or `KILN_API_KEY`).

Standard output carries the answer and nothing else; progress and notes go to standard error. With `--json` the answer is one JSON document (of `kiln logs`, one a line), and so is an error: `{"error": {"code", "message", "hint", "request_id"}}`, with `job_id` where a job was accepted, or `idempotency_key` where nobody knows whether it was. `kiln --install-completion` teaches the shell to complete commands, adapters and jobs.
"""


def cli_page() -> str:
    from typer.main import get_command

    from kiln_cli import exit_codes
    from kiln_cli.main import app

    lines = [INTRO, "| exit code | |\n|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in exit_codes.MEANINGS.items()]
    for name, command in leaves(get_command(app), "kiln"):
        lines.append(_section(name, command))
    return "\n".join(lines) + "\n"


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that is not a group, with its whole name."""
    for child_name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from leaves(child, f"{name} {child_name}")
        elif not child.hidden:
            yield f"{name} {child_name}", child


def examples(command: Any) -> list[str]:
    """The commands that the help gives as examples."""
    _, _, text = (command.help or "").partition("Example")
    return re.findall(r"\[bold\](kiln .*?)\[/bold\]", text, re.DOTALL)


def _section(name: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = " ".join([name, *map(_metavar, arguments), "[options]"])
    text, _, _ = (command.help or "").partition("Example")
    shown = re.sub(r"\[/?\w+\]", "", text).strip()
    lines = [f"\n## {name}\n\n`{usage}`\n\n{shown}\n"]
    found = examples(command)
    if found:
        lines.append("```bash\n" + "\n".join(found) + "\n```\n")
    rows = [
        _row(param) for param in command.params if param.name not in ("help", "as_json", "url", "api_key")
    ]
    if rows:
        lines.append("| | |\n|---|---|")
    return "\n".join([*lines, *rows])


def _metavar(argument: Any) -> str:
    name = argument.name.upper() + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _row(param: Any) -> str:
    names = [*param.opts, *param.secondary_opts] if param.param_type_name == "option" else [param.name]
    shown = ", ".join(f"`{name}`" for name in names)
    notes = [(param.help or "").replace("|", "\\|")]
    if param.required:
        notes.append("Required.")
    elif (
        isinstance(param.default, int | float | str)
        and not isinstance(param.default, bool)
        and param.default != ""
    ):
        notes.append(f"`{param.default}` when left out.")
    return f"| {shown} | {' '.join(filter(None, notes))} |"
