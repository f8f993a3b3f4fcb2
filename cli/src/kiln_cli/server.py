"""Which server a command talks to: the one that was named, else this user's own, else the usual address."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kiln_cli.up.state_dir import default_state_dir, running_url


@dataclass(frozen=True)
class Server:
    """`url` is None for the client's default; `why` is a sentence about where the address comes from."""

    url: str | None
    why: str


def find_server(url: str | None, state_dir: Path | None = None) -> Server:
    """`url` as --url or KILN_URL gave it; otherwise that of the `kiln up` that runs in `state_dir`.

    `state_dir` is KILN_STATE_DIR or the usual one when left out.
    """
    url = url or os.environ.get("KILN_URL")
    if url:
        return Server(url, "The address was given by --url or KILN_URL.")
    folder = state_dir or Path(os.environ.get("KILN_STATE_DIR") or default_state_dir())
    folder = folder.expanduser()
    found = running_url(folder)
    if found:
        return Server(found, f"It is the address of the kiln up that has its state in {folder}.")
    return Server(None, f"It is the default: no kiln up has its state in {folder} now.")
