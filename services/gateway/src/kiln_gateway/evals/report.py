"""Suites, runs and comparisons as clients see them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kiln_common.pb import evaluations_pb2
from kiln_gateway.evals.errors import RunNotFinished, RunsNotComparable
from kiln_gateway.evals.statistics import compare, mean_interval
from kiln_gateway.schemas.evals import EvalCaseFields

_CONFIDENCE = 0.95


def summarise(
    cases: Sequence[EvalCaseFields], results: Mapping[int, evaluations_pb2.EvalCase]
) -> dict[str, Any]:
    """What came of a run; invalid answers count as wrong."""
    by_scorer: dict[str, list[float]] = {}
    for index, case in enumerate(cases):
        by_scorer.setdefault(case.scorer.type, []).append(results[index].score)
    return {
        "score": _interval([results[index].score for index in range(len(cases))]),
        "num_invalid": sum(not results[index].is_valid for index in range(len(cases))),
        "by_scorer": {
            name: {"num_cases": len(scores), **_interval(scores)} for name, scores in by_scorer.items()
        },
    }


def _interval(scores: Sequence[float]) -> dict[str, Any]:
    return {**asdict(mean_interval(scores)), "confidence": _CONFIDENCE}


def suite_object(suite: evaluations_pb2.EvalSuite) -> dict[str, Any]:
    return {
        "id": suite.id,
        "object": "eval.suite",
        "name": suite.name,
        "version": suite.version,
        "sha256": suite.sha256,
        "num_cases": suite.num_cases,
        "created_at": suite.created_at_s,
    }


def run_object(run: evaluations_pb2.EvalRun, *, has_cases: bool = False) -> dict[str, Any]:
    """The run of GET /v1/evals/runs/{id}; times are seconds since the epoch, null when not yet."""
    summary = json.loads(run.summary_json or "{}")
    error = {"code": run.error.code, "message": run.error.message, "hint": run.error.hint or None}
    shown: dict[str, Any] = {
        "id": run.id,
        "object": "eval.run",
        "status": run.status,
        "suite": {"id": run.suite.id, "name": run.suite.name, "version": run.suite.version},
        "adapter": run.adapter,
        "sampling": json.loads(run.settings_json),
        "progress": {"done": run.num_done, "cases": run.suite.num_cases},
        "score": summary.get("score"),
        "num_invalid": summary.get("num_invalid"),
        "by_scorer": summary.get("by_scorer"),
        "error": error if run.HasField("error") else None,
        "job_id": run.job_id or None,
        "created_at": run.created_at_s or None,
        "started_at": run.started_at_s or None,
        "finished_at": run.finished_at_s or None,
    }
    if has_cases:
        shown["cases"] = [
            {
                "index": case.index,
                "score": case.score,
                "is_valid": case.is_valid,
                "answer": case.answer,
                "detail": case.detail,
            }
            for case in run.cases
        ]
    return shown


def comparison_object(
    baseline: evaluations_pb2.EvalRun, candidate: evaluations_pb2.EvalRun
) -> dict[str, Any]:
    """Two runs case by case. Raises RunNotFinished, RunsNotComparable."""
    for run in (baseline, candidate):
        if run.status != "succeeded":
            raise RunNotFinished(f"the run {run.id} is {run.status}")
    if baseline.suite.id != candidate.suite.id:
        raise RunsNotComparable(
            f"{baseline.id} is over {_name(baseline)}, {candidate.id} over {_name(candidate)}"
        )
    if json.loads(baseline.settings_json) != json.loads(candidate.settings_json):
        raise RunsNotComparable(f"{baseline.id} and {candidate.id} were drawn with different sampling")
    old = [case.score for case in baseline.cases]
    new = [case.score for case in candidate.cases]
    found = compare(old, new)
    return {
        "object": "eval.comparison",
        "suite": {"id": baseline.suite.id, "name": baseline.suite.name, "version": baseline.suite.version},
        "baseline": _side(baseline),
        "candidate": _side(candidate),
        "difference": {**asdict(found.difference), "confidence": _CONFIDENCE},
        "num_better": found.num_better,
        "num_worse": found.num_worse,
        "num_same": found.num_same,
        "p_value": found.p_value,
        "test": found.test,
    }


def _side(run: evaluations_pb2.EvalRun) -> dict[str, Any]:
    return {"run": run.id, "adapter": run.adapter, "score": json.loads(run.summary_json)["score"]}


def _name(run: evaluations_pb2.EvalRun) -> str:
    return f"{run.suite.name}@{run.suite.version}"
