"""Why a request about suites or runs is refused."""

from __future__ import annotations

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError


class EvalSuiteNotFound(KilnError):
    """No evaluation suite that this key may see has this name."""

    code = "eval_suite_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = "GET /v1/evals/suites lists the suites there are."
    param = "suite"


class InvalidSuiteName(InvalidRequest):
    """The name has characters, or a length, that no suite's name has."""

    code = "invalid_suite_name"
    hint = "Use 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit."
    param = "name"


class EvalRunNotFound(KilnError):
    """No evaluation run that this key may see has this id."""

    code = "eval_run_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = "GET /v1/evals/runs lists the runs there are."


class EvalClaimLost(KilnError):
    """Another runner carries the run out now, or it has ended or was deleted."""

    code = "eval_claim_lost"
    hint = "Nothing is to be done: GET /v1/evals/runs/{id} says how the run stands."
    kind = ErrorKind.CONFLICT


class EvalRunCrashed(KilnError):
    """Every gateway that took the run over went away without finishing one more case."""

    code = "eval_run_crashed"
    hint = "The gateways' logs say how they ended; start the run again."
