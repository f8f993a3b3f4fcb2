"""What is kept with a version: its job's metrics, and what the versions before it earned."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from kiln_common.pb import trainer_pb2

REWARDS_BY_VERSION = "rewards_by_version"
# The registry bounds the text; a job rarely learns from the completions of more than a few versions.
_MOST_VERSIONS = 50
_MOST_NAME_CHARS = 160


def version_metrics(request: trainer_pb2.SubmitRequest, metrics: Mapping[str, float]) -> str:
    """A JSON object of the last step's `metrics`; and, of rewarded completions, whose they were.

    `rewards_by_version` has the mean reward and the number of completions by the "name@version"
    ("base" for the bare base model) that wrote them. Completions whose version is not known, or
    that several wrote, are left out.
    """
    rewards = _rewards_by_version(request)
    return json.dumps({**metrics, REWARDS_BY_VERSION: rewards} if rewards else dict(metrics))


def _rewards_by_version(request: trainer_pb2.SubmitRequest) -> dict[str, dict[str, Any]]:
    rewards: dict[str, list[float]] = {}
    for rollout in (rollout for group in request.grpo.groups for rollout in group.rollouts):
        version = rollout.adapter_version
        if version and "," not in version and len(version) <= _MOST_NAME_CHARS:
            rewards.setdefault(version, []).append(rollout.reward)
    most_common = sorted(rewards, key=lambda version: -len(rewards[version]))[:_MOST_VERSIONS]
    return {
        version: {"mean": statistics.fmean(rewards[version]), "num_completions": len(rewards[version])}
        for version in most_common
    }
