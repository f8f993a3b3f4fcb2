"""The gate of a training job: from its request to the trainer, and back to clients."""

from __future__ import annotations

import json
from typing import Any

from kiln_common.errors import KilnError
from kiln_common.pb import trainer_pb2
from kiln_gateway.ports import EvaluationsPort
from kiln_gateway.schemas.gate import GateFields


async def resolved_gate(
    gate: GateFields | None, owner: str, evaluations: EvaluationsPort
) -> trainer_pb2.Gate | None:
    """The gate with its suite's version fixed. Raises eval_suite_not_found."""
    if gate is None:
        return None
    try:
        suite = await evaluations.get_suite(owner, gate.suite)
    except KilnError as error:
        if error.param == "suite":
            error.param = "gate.suite"
        raise
    return trainer_pb2.Gate(
        suite_id=suite.id,
        suite=f"{suite.name}@{suite.version}",
        min_score=gate.min_score,
        settings_json=gate.sampling.model_dump_json(),
        owner=owner,
        timeout_s=gate.timeout_s,
    )


def gate_config(gate: trainer_pb2.Gate) -> dict[str, Any]:
    """The gate as clients wrote it, or could have."""
    return {
        "suite": gate.suite,
        "min_score": gate.min_score,
        "sampling": json.loads(gate.settings_json),
        "timeout_s": gate.timeout_s,
    }


def gate_outcome(result: trainer_pb2.JobResult) -> dict[str, Any] | None:
    """How the gate was passed, or why not; None for a job without one."""
    if not result.HasField("gate"):
        return None
    outcome = result.gate
    return {
        "passed": outcome.passed,
        "reason": outcome.reason,
        "run": outcome.run_id or None,
        "suite": outcome.suite,
        "min_score": outcome.min_score,
        "score": outcome.score if outcome.HasField("score") else None,
    }
