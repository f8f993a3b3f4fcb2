"""Adapters and their versions as clients see them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kiln_common.pb import registry_pb2

# What the trainer keeps beside the metrics: mean reward and number of the completions that the job
# learned from, by the version that wrote them.
_REWARDS = "rewards_by_version"


@dataclass(frozen=True, slots=True)
class Resident:
    """An engine that holds a version, and how many of its requests run on it."""

    boot_id: str
    num_pins: int


def adapter_object(
    adapter: registry_pb2.Adapter, residents: Mapping[str, Sequence[Resident]]
) -> dict[str, Any]:
    """A name with its versions; `residents` by "name@version"."""
    return {
        "name": adapter.name,
        "object": "adapter",
        "latest_version": adapter.latest_version or None,
        "attached_version": adapter.attached_version or None,
        "versions": [
            version_object(version, residents.get(f"{adapter.name}@{version.version}", ()))
            for version in adapter.versions
        ],
    }


def version_object(
    version: registry_pb2.AdapterVersion, residents: Sequence[Resident] = ()
) -> dict[str, Any]:
    parent = f"{version.parent_name}@{version.parent_version}" if version.parent_version else None
    return {
        "id": f"{version.name}@{version.version}",
        "object": "adapter.version",
        "name": version.name,
        "version": version.version,
        "sha256": version.sha256,
        "source_sha256": version.source_sha256 or None,
        "bytes": version.num_bytes,
        "rank": version.rank,
        "alpha": version.alpha,
        "targets": list(version.targets),
        "parent": parent,
        "job_id": version.job_id or None,
        "data_sha256": version.data_sha256 or None,
        "merged_from": _merge_object(version) if version.merge_mode else None,
        "base_model_hash": version.base_model_hash,
        "metrics": metrics_of(version),
        "rewards_by_version": _kept(version).get(_REWARDS, {}),
        "created_at": version.created_at_s,
        "resident_on": [resident.boot_id for resident in residents],
    }


def metrics_of(version: registry_pb2.AdapterVersion) -> dict[str, Any]:
    """What was measured of the version itself, by name."""
    return {name: value for name, value in _kept(version).items() if name != _REWARDS}


def _kept(version: registry_pb2.AdapterVersion) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(version.metrics_json or "{}")
    return kept


def _merge_object(version: registry_pb2.AdapterVersion) -> dict[str, Any]:
    sources = [
        {"id": f"{source.name}@{source.version}", "weight": source.weight} for source in version.merged_from
    ]
    return {"mode": version.merge_mode, "sources": sources}
