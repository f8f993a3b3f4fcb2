"""What a shell offers for an argument: names asked of the server, if it answers at once."""

from __future__ import annotations

from kiln_cli.server import find_server

_PATIENCE_S = 1.0


def complete_adapter(incomplete: str) -> list[str]:
    """Adapter names that begin so."""
    return [name for name in _adapter_names() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """What `--model` takes: base, and adapter names."""
    return [name for name in ["base", *_adapter_names()] if name.startswith(incomplete)]


def complete_job(incomplete: str) -> list[str]:
    """Ids of the newest jobs."""
    import kiln

    try:
        with kiln.Client(find_server(None).url, timeout_s=_PATIENCE_S) as client:
            ids = [job.id for job in client.train.jobs(limit=50)]
    except kiln.KilnError:
        return []
    return [job_id for job_id in ids if job_id.startswith(incomplete)]


def _adapter_names() -> list[str]:
    import kiln

    try:
        with kiln.Client(find_server(None).url, timeout_s=_PATIENCE_S) as client:
            return [adapter.name for adapter in client.adapters.list()]
    except kiln.KilnError:
        return []
