"""What the pages for people name: routes, metrics, variables, commands, files and links."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

from kiln_cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "demo/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Where variables are read that no settings class has.
_SOURCES = ("libs", "services", "cli", "scripts", "benchmarks", "demo", "deploy", "tests")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ROUTE = re.compile(r"\b(GET|POST|PUT|PATCH|DELETE) (/[\w/{}.-]*)")
_BARE_ROUTE = re.compile(r"(/v1/[\w/{}.-]*|/(?:healthz|readyz|health|metrics|openapi\.json))(?:\?.*)?")
_METRIC = re.compile(r"\bkiln_(?:gateway|engine|trainer)_[a-z_]+\b")
_VARIABLE = re.compile(r"\b(?:KILN|OTEL)_[A-Z0-9_]+\b")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FILE = re.compile(r"(?:docs|deploy|scripts|tests|libs|services|cli|demo|benchmarks|protos)/[\w./-]+\w")


@dataclass(frozen=True)
class Page:
    """One page's text and the code in it."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def code(self) -> list[str]:
        """Every piece of inline code, and every line of a block."""
        lines = [line for _, block in _BLOCK.findall(self.text) for line in block.splitlines()]
        return [*_INLINE.findall(_BLOCK.sub("", self.text)), *lines]

    def routes(self) -> set[tuple[str, str]]:
        """(method or "", path)."""
        found = {route for code in self.code for route in _ROUTE.findall(code)}
        bare = (_BARE_ROUTE.fullmatch(code) for code in self.code)
        return found | {("", match.group(1)) for match in bare if match}

    def metrics(self) -> set[str]:
        return {name for code in self.code for name in _METRIC.findall(code)} - PACKAGES

    def variables(self) -> set[str]:
        return {name for code in self.code for name in _VARIABLE.findall(code)}

    def commands(self) -> Iterator[list[str]]:
        """The words of each command line: `kiln …`, `make …`, `python -m …`."""
        for code in self.code:
            words = _words(code)
            while words and ("=" in words[0] or words[0] in ("$", "nice", "sudo")):
                words = words[1:]
            if words and words[0].removeprefix(".venv/bin/") in ("kiln", "make", "python", "docker"):
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]

    def files(self) -> set[str]:
        return {name for code in self.code for name in _FILE.findall(code) if "*" not in code}

    def links(self) -> set[str]:
        return {link for link in _LINK.findall(self.text) if "://" not in link}


PACKAGES = {f"kiln_{name}" for name in ("gateway", "engine", "trainer", "registry", "common", "nn", "cli")}


def _words(code: str) -> list[str]:
    try:
        return shlex.split(code, comments=True)
    except ValueError:  # not a command line
        return []


@cache
def variables_of_source() -> frozenset[str]:
    """Variables that settings have, or that some code names."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import generate_docs
    finally:
        sys.path.pop(0)
    found = set(_VARIABLE.findall(generate_docs.settings_page(generate_docs.all_classes())))
    files = [ROOT / "Makefile", ROOT / "docker-compose.yml"]
    for folder in _SOURCES:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".yml")]
    for path in files:
        found |= set(_VARIABLE.findall(path.read_text(encoding="utf-8")))
    return frozenset(found)


def what_is_wrong_with(words: list[str]) -> str:
    """Why a command line cannot be run as it stands; empty for one that can."""
    if words[0] == "kiln":
        return _wrong_with_kiln(words[1:])
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = [word for word in words[1:] if re.fullmatch("[a-z-]+", word)]
        return "" if set(wanted) <= targets else f"no target {set(wanted) - targets}"
    if words[:2] == ["python", "-m"] and len(words) > 2:
        return "" if importlib.util.find_spec(words[2]) is not None else f"no module {words[2]}"
    return ""


def _wrong_with_kiln(words: list[str]) -> str:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if not re.fullmatch("[a-z-]+", words[0]):
            return ""  # a placeholder
        if words[0] not in command.commands:
            return f"{command.name} has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    used = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
    unknown = used - options - {"--help", "--install-completion", "--show-completion"}
    return f"{command.name} has no option {sorted(unknown)}" if unknown else ""


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
