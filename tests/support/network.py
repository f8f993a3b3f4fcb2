"""Two hosts with a cable between them: network namespaces that need no privileges, where the kernel allows it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tests.support.stack import wait_for

_TOOLS = ("unshare", "nsenter", "ip")


def why_no_namespaces() -> str:
    """Empty where this user may make network namespaces."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    probe = "ip link add left type veth peer name right"
    done = subprocess.run(["unshare", "-Urn", "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else ""


class TwoHosts:
    """`left` and `right` share the file system and processes; between them there is only the cable."""

    ADDRESSES: ClassVar = {"left": "10.77.0.1", "right": "10.77.0.2"}

    def __enter__(self) -> TwoHosts:
        self._pids: dict[str, int] = {}
        self._holders: list[subprocess.Popen[bytes]] = []
        # Both within one user namespace, so that the cable may lead from one to the other.
        self._hold("left", ["unshare", "-Urn"])
        self._hold("right", [*self._enter("left"), "unshare", "-n"])
        self._run("left", f"link add left type veth peer name right netns {self._pids['right']}")
        for host, address in self.ADDRESSES.items():
            self._run(host, f"address add {address}/24 dev {host}")
            for device in ("lo", host):
                self._run(host, f"link set {device} up")
        return self

    def __exit__(self, *exc_info: object) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def start(self, host: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> Any:
        """Run a process on one of them."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self._enter(host), *command], env={**os.environ, **env}, stdout=output, stderr=output
            )

    def cut(self) -> None:
        """From here on what is sent gets lost, and neither end is told."""
        self._run("right", "link set right down")

    def heal(self) -> None:
        self._run("right", "link set right up")

    def _hold(self, host: str, entering: Sequence[str]) -> None:
        holder = subprocess.Popen([*entering, "sleep", "infinity"])
        self._holders.append(holder)
        # Both tools become the command they run, in the same process.
        wait_for(lambda: _command_of(holder.pid) == "sleep", f"the namespace of {host}")
        self._pids[host] = holder.pid

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "--target", str(self._pids[host]), "--user", "--net", "--preserve-credentials"]

    def _run(self, host: str, arguments: str) -> None:
        subprocess.run([*self._enter(host), "ip", *arguments.split()], check=True)


def _command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()
