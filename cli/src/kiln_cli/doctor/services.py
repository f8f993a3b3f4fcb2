"""Checks of what runs: the server at the given address, and the services of this machine's `kiln up`."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import kiln
from kiln_cli.doctor.check import Finding, State, ok
from kiln_cli.hints import in_words_of_the_command
from kiln_cli.up import readiness
from kiln_cli.up.options import run_dir_of
from kiln_common.bus.private_server import server_command

_NOT_RUNNING = "kiln up is not running with this state folder"
_RESTARTS = "kiln logs {0} says why; kiln up starts it again by itself when it ends."
_START_TIMEOUT_S = 15.0


def gateway(client: kiln.Client) -> Finding:
    """Whether the server can answer, and which of its parts are away."""
    try:
        health = client.health()
    except kiln.ConnectionFailed as error:
        return Finding(State.SKIPPED, error.message, "kiln up starts a server here; KILN_URL names another.")
    except kiln.KilnError as error:
        return Finding(State.FAILED, f"{error.code}: {error.message}", in_words_of_the_command(error.hint))
    away = [name for name, state in health["dependencies"].items() if state != "ok"]
    detail = f"{client.base_url} serves {health.get('model')}" if health.get("model") else client.base_url
    if not away:
        return ok(f"{detail}; it reaches {', '.join(health['dependencies'])}")
    state = State.FAILED if health["status"] == "unavailable" else State.WARNING
    hint = f"kiln logs {' '.join(away)} says why; docs/operations.md says what goes on without them."
    return Finding(state, f"{detail}; away: {', '.join(away)}", hint)


def names_of(kind: str, state_dir: Path) -> list[str]:
    """The first engine or trainer, and those that kiln up started beside it."""
    return [kind, *sorted(path.stem for path in run_dir_of(state_dir).glob(f"{kind}-*.sock"))]


def service(name: str, state_dir: Path) -> Finding:
    """A registry, engine or trainer, asked over its own socket."""
    socket_path = run_dir_of(state_dir) / f"{name}.sock"
    if not socket_path.exists():
        return Finding(State.SKIPPED, _NOT_RUNNING)
    probe = readiness.engine_ready if name.startswith("engine") else readiness.grpc_ready
    answer = asyncio.run(probe(f"unix:{socket_path}"))
    if answer is None:
        return Finding(State.FAILED, f"{socket_path} does not answer", _RESTARTS.format(name))
    return ok(answer or f"answers on {socket_path}")


def redis(state_dir: Path, *, may_start: bool) -> Finding:
    """The configured Redis, the one of `kiln up`, or, where neither is there, one started for the moment."""
    url = os.environ.get("KILN_REDIS_URL")
    if url:
        answer = asyncio.run(readiness.redis_ready(url))
        if answer is None:
            return Finding(
                State.FAILED, "KILN_REDIS_URL does not answer", "Start it, or unset KILN_REDIS_URL."
            )
        return ok(answer)
    socket_path = run_dir_of(state_dir) / "redis.sock"
    if socket_path.exists():
        answer = asyncio.run(readiness.redis_ready(f"unix://{socket_path}"))
        if answer is None:
            return Finding(State.FAILED, f"{socket_path} does not answer", _RESTARTS.format("redis"))
        return ok(answer)
    if not may_start:
        return Finding(State.SKIPPED, f"{_NOT_RUNNING}; --strict starts a Redis of its own for a moment")
    with tempfile.TemporaryDirectory(prefix="kiln-doctor-") as folder:
        path = Path(folder) / "redis.sock"
        command = server_command(Path(folder), socket_path=path)
        found = asyncio.run(_started(command, lambda: readiness.redis_ready(f"unix://{path}")))
    if found is None:
        return Finding(
            State.FAILED,
            "the private Redis did not start",
            "make setup installs it; KILN_REDIS_URL names another.",
        )
    return ok(f"{found}, started and stopped")


async def _started(command: list[str], probe: Callable[[], Awaitable[str | None]]) -> str | None:
    """Run `command` until the probe answers, then end it; None when it never does."""
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while process.returncode is None:
                answer = await probe()
                if answer is not None:
                    return answer
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
    return None
