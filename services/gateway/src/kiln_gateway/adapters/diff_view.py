"""The difference of two adapter versions as clients see it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kiln_common.pb import evaluations_pb2, registry_pb2
from kiln_gateway.adapters.adapter_view import metrics_of

_LAYER = re.compile(r"\.layers\.(\d+)\.")


BASE = "base"  # what runs call the bare base model


def diff_object(
    found: registry_pb2.CompareResponse,
    from_parent: registry_pb2.CompareResponse | None,
    runs: Sequence[evaluations_pb2.EvalRun],
) -> dict[str, Any]:
    """Norms of the two updates and of their difference: in all, per layer, per module; and scores.

    `from_parent` is the comparison of the later version with its parent, where there is one. `runs`
    are evaluations of either version, newest first.
    """
    earlier, later = found.earlier if found.HasField("earlier") else None, found.later
    by_layer: dict[int | None, list[registry_pb2.ModuleComparison]] = {}
    for module in found.modules:
        layer = _LAYER.search(module.path)
        by_layer.setdefault(int(layer[1]) if layer else None, []).append(module)
    parent_cosine = _sums(from_parent.modules)["cosine"] if from_parent is not None else None
    return {
        "object": "adapter.diff",
        "name": later.name,
        "from": _label(earlier) if earlier is not None else None,
        "to": _label(later),
        "parent": _label(from_parent.earlier) if from_parent is not None else None,
        "total": {**_sums(found.modules), "cosine_to_parent": parent_cosine},
        "layers": [
            {
                "layer": layer,
                **_sums(modules),
                "modules": [{"path": module.path, **_sums([module])} for module in modules],
            }
            for layer, modules in by_layer.items()
        ],
        "metrics": _metric_deltas(earlier, later),
        "evaluations": _score_deltas(runs, _label(earlier) if earlier is not None else BASE, _label(later)),
    }


def _sums(modules: Sequence[registry_pb2.ModuleComparison]) -> dict[str, float | None]:
    """Of several layers' updates as one: their squares and inner products add up."""
    norm_from = math.sqrt(sum(module.norm_earlier**2 for module in modules))
    norm_to = math.sqrt(sum(module.norm_later**2 for module in modules))
    norm_product = norm_from * norm_to
    inner_product = sum(module.inner_product for module in modules)
    return {
        "norm_from": norm_from,
        "norm_to": norm_to,
        "norm_change": math.sqrt(sum(module.norm_change**2 for module in modules)),
        "cosine": inner_product / norm_product if norm_product else None,
    }


def _metric_deltas(
    earlier: registry_pb2.AdapterVersion | None, later: registry_pb2.AdapterVersion
) -> dict[str, dict[str, float | None]]:
    """Every number that was kept with one of the two, by name; nested ones with dots."""
    before = dict(_numbers(metrics_of(earlier))) if earlier is not None else {}
    after = dict(_numbers(metrics_of(later)))
    return {
        name: {
            "from": before.get(name),
            "to": after.get(name),
            "delta": after[name] - before[name] if name in before and name in after else None,
        }
        for name in sorted({*before, *after})
    }


def _score_deltas(runs: Sequence[evaluations_pb2.EvalRun], earlier: str, later: str) -> list[dict[str, Any]]:
    """Of each suite that either version was evaluated on: the newest scores, and how they differ."""
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        scores = newest.setdefault(f"{run.suite.name}@{run.suite.version}", {})
        scores.setdefault(run.adapter, {"run": run.id, **json.loads(run.summary_json)["score"]})
    return [
        {
            "suite": suite,
            "from": (before := scores.get(earlier)),
            "to": (after := scores.get(later)),
            "delta": after["mean"] - before["mean"] if before and after else None,
        }
        for suite, scores in sorted(newest.items())
    ]


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _label(version: registry_pb2.AdapterVersion) -> str:
    return f"{version.name}@{version.version}"
