"""An engine-like process: loads a checkpoint, serves its weights, ends when its input does.

`python -m tests.support.weight_owner FOLDER SOCKET DEVICE TRANSPORT` prints one line of JSON once it
serves. Tests drive it through OwnerProcess.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]


class OwnerProcess:
    """The parent's handle; a context manager that leaves no process behind."""

    def __init__(self, folder: Path, socket_path: Path, device: str, transport: str) -> None:
        command = [sys.executable, "-m", "tests.support.weight_owner", folder, socket_path, device, transport]
        self.process = subprocess.Popen(
            command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the owner died of {self.process.wait()}"
        self.started: dict[str, Any] = json.loads(line)

    def kill(self) -> None:
        """SIGKILL: nothing is said to readers, nothing is cleaned up."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> OwnerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def main(folder: str, socket_path: str, device: str, transport: Any) -> None:
    from kiln_nn.sharing import WeightServer
    from kiln_nn.weights import load_checkpoint

    loaded = load_checkpoint(folder, device, transport=transport)
    with WeightServer(loaded.arena, socket_path):
        print(
            json.dumps({"boot_id": loaded.manifest.boot_id, "checksum": loaded.arena.checksum()}), flush=True
        )
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
