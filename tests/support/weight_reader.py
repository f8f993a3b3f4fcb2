"""A trainer-like second process that attaches to shared weights and does what a test tells it to.

Run as `python -m tests.support.weight_reader SOCKET`: it reads one command per line and answers
each with one line of JSON. Tests drive it through ReaderProcess.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]


class ReaderProcess:
    """The parent's handle on one reader process; a context manager that leaves none behind."""

    def __init__(self, socket_path: Path) -> None:
        command = [sys.executable, "-m", "tests.support.weight_reader", str(socket_path)]
        self.process = subprocess.Popen(
            command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.send(command)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the reader died of {self.process.wait()} on {command!r}"
        return json.loads(line)

    def send(self, command: str) -> None:
        """Send a command without waiting: for those that the reader does not survive."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _private_host_bytes() -> int:
    """Memory that only this process has: what a copy of the weights would add to."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def _device_bytes(torch: Any) -> dict[str, int]:
    if not torch.cuda.is_available():
        return {"allocated": 0, "free": 0}
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    return {"allocated": torch.cuda.memory_allocated(), "free": torch.cuda.mem_get_info()[0]}


def main(socket_path: str) -> None:
    """Serve commands until the parent closes the pipe: attach, alive, checksum, write NAME, product NAME, close."""
    import torch

    from kiln_nn.sharing import attach

    torch.set_num_threads(1)
    shared, views = None, {}
    for line in sys.stdin:
        verb, _, name = line.strip().partition(" ")
        answer: dict[str, Any] = {}
        if verb == "attach":
            device_before, host_before = _device_bytes(torch), _private_host_bytes()
            shared = attach(socket_path)
            views = shared.views()
            device_after = _device_bytes(torch)
            answer = {
                "boot_id": shared.manifest.boot_id,
                "checksum": shared.checksum(),
                "foreign_bytes": shared.num_foreign_bytes(views),
                "view_bytes": sum(view.nbytes for view in views.values()),
                "host_growth": _private_host_bytes() - host_before,
                "device_growth": device_before["free"] - device_after["free"],
                "torch_growth": device_after["allocated"] - device_before["allocated"],
            }
        elif verb == "alive":
            assert shared is not None
            answer = {"is_alive": shared.is_alive()}
        elif verb == "checksum":
            assert shared is not None
            answer = {"checksum": shared.checksum()}
        elif verb == "product":
            view = views[name].double()
            answer = {"product": (view @ view.sum(dim=0)).sum().item()}
        elif verb == "write":
            views[name].zero_()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            answer = {"written": name}
        elif verb == "close":
            assert shared is not None
            views = {}
            shared.close()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
