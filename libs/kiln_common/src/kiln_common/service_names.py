"""What the services of a deployment are called: in logs, pids, metrics, /health and `kiln status` alike."""

from __future__ import annotations


def service_name(kind: str, number: int) -> str:
    """The name of the `number`th of a kind, counted from 0: engine, engine-2, engine-3."""
    return kind if number == 0 else f"{kind}-{number + 1}"
