"""What a job publishes on its way to the end, and how a cancel takes it back."""

from __future__ import annotations

from dataclasses import replace

import structlog

from kiln_common.errors import AdapterNotFound, KilnError
from kiln_common.pb import registry_pb2
from kiln_trainer.jobs.ports import Publisher
from kiln_trainer.jobs.records import Published

log = structlog.get_logger()


def with_version(published: Published, step: int, version: registry_pb2.AdapterVersion) -> Published:
    """`published` and one version more; one that a resumed job publishes again is there once."""
    entry = {"step": step, "adapter": version.name, "version": version.version, "sha256": version.sha256}
    if entry in published.versions:
        return published
    return replace(published, versions=(*published.versions, entry))


def take_back(adapter: str, job_id: str, default_before: str, publisher: Publisher) -> list[str]:
    """Delete what the job has published; where one of it is the default, `default_before` is again.

    Asks the registry what there is: a trainer may have died before it recorded its last version. Safe
    to repeat. Returns the references that were deleted.

    Raises:
        KilnError: the registry is away, or does not let go of a version.
    """
    numbers = [version.version for version in publisher.versions(adapter) if version.job_id == job_id]
    references = [f"{adapter}@{number}" for number in numbers]
    if publisher.default_adapter() in references:
        try:
            publisher.attach(default_before)
        except KilnError as error:
            if error.code != AdapterNotFound.code:
                raise
            publisher.attach("")  # it was deleted meanwhile
    for number in numbers:
        publisher.withdraw(adapter, number)
    log.info("published_versions_discarded", versions=references)
    return references
