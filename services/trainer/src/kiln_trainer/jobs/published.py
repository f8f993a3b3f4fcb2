"""What a job publishes on its way to the end, and how a cancel takes it back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import structlog

from kiln_common.errors import AdapterNotFound, KilnError
from kiln_common.pb import registry_pb2
from kiln_trainer.jobs.ports import Publisher
from kiln_trainer.jobs.records import Published

log = structlog.get_logger()

# What the registry answers for a version that was deleted after its key had made it, and for the default.
VERSION_DELETED = "adapter_version_deleted"
_IN_USE = "adapter_in_use"


def with_version(published: Published, step: int, version: registry_pb2.AdapterVersion) -> Published:
    """`published` and one version more; one that a resumed job publishes again is there once."""
    entry = {"step": step, "adapter": version.name, "version": version.version, "sha256": version.sha256}
    if entry in published.versions:
        return published
    return replace(published, versions=(*published.versions, entry))


def without(published: Published, references: Collection[str]) -> Published:
    """`published` without the versions of these references."""
    left = [v for v in published.versions if f"{v['adapter']}@{v['version']}" not in references]
    return replace(published, versions=tuple(left))


def take_back(adapter: str, job_id: str, default_before: str | None, publisher: Publisher) -> list[str]:
    """Delete what the job has published; where one of it is the default, `default_before` is again.

    `default_before` is None for a job that has attached nothing: then somebody else chose the default,
    and that version stays, as does one that is attached meanwhile. Asks the registry what there is: a
    trainer may have died before it recorded its last version. Safe to repeat. Returns the references
    that were deleted.

    Raises:
        KilnError: the registry is away.
    """
    numbers = [version.version for version in publisher.versions(adapter) if version.job_id == job_id]
    default = publisher.default_adapter()
    if default_before is not None and default in [f"{adapter}@{number}" for number in numbers]:
        try:
            publisher.attach(default_before)
        except KilnError as error:
            if error.code != AdapterNotFound.code:
                raise
            publisher.attach("")  # it was deleted meanwhile
    deleted = [f"{adapter}@{number}" for number in numbers if _withdraw(publisher, adapter, number)]
    log.info("published_versions_discarded", versions=deleted)
    return deleted


def _withdraw(publisher: Publisher, adapter: str, number: int) -> bool:
    """Whether the version is gone; it is not while it is the default."""
    try:
        publisher.withdraw(adapter, number)
    except KilnError as error:
        if error.code != _IN_USE:
            raise
        log.info("default_not_discarded", adapter=f"{adapter}@{number}")
        return False
    return True
