"""A headless Chromium that reaches this machine only, and what the dashboard's tests ask of its pages."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import axe_playwright_python

from tests.support.gateway import REPOSITORY

# Kept after a run, to be looked at.
ARTEFACTS = Path(os.environ.get("KILN_TEST_ARTEFACTS", REPOSITORY / "build" / "dashboard"))
WIDTHS = {"narrow": (360, 740), "wide": (1440, 900)}
# What must come is waited for: a browser beside a busy machine's other work is slow.
PATIENCE_MS = 60_000
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OWN = REPOSITORY / ".venv" / "browsers"
_AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
_SERIOUS = ("serious", "critical")


@functools.cache
def _chromium() -> str | None:
    """The first that starts, as scripts/install_browser.sh decides: some distributions have a stub."""
    installed = (found for name in _NAMES if (found := shutil.which(name)))
    own = (str(found) for found in _OWN.glob("*/*/*headless*shell") if found.is_file())
    return next((path for path in (*installed, *own) if _starts(path)), None)


def _starts(path: str) -> bool:
    return subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False).returncode == 0


def launch_options() -> dict[str, Any]:
    """For playwright's `chromium.launch`: the installed browser, with no network but loopback."""
    path = _chromium()
    assert path is not None, "no Chromium is here: run scripts/install_browser.sh"
    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium has no sandbox for root
    return {"executable_path": path, "args": arguments}


class PageWatch:
    """Collects what a page must not do: write errors, or ask anybody but its own server."""

    def __init__(self, page: Any, url: str) -> None:
        self.complaints: list[str] = []
        self._url = url
        # What the page is expected to be refused, by status: browsers write each into the console.
        self.expected_statuses: set[int] = set()
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        refused = re.search(r"responded with a status of (\d+)", message.text)
        if refused and int(refused[1]) in self.expected_statuses:
            return
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(self._url):
            self.complaints.append(f"asked {request.url}")


def is_wider_than_screen(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def accessibility_findings(page: Any) -> list[str]:
    """axe's serious and critical findings on the page as it stands, one line each."""
    # Evaluated by the debugger, which the page's content security policy does not bind.
    if not page.evaluate("typeof axe !== 'undefined'"):
        page.evaluate(_AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        if violation["impact"] in _SERIOUS
        for node in violation["nodes"]
    ]
