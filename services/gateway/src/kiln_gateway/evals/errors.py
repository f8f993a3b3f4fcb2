"""Why a suite, a run or a comparison is refused."""

from __future__ import annotations

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError


class InvalidSuite(InvalidRequest):
    """Lines of a suite are wrong; the message names the first fifty, and nothing was kept."""

    code = "invalid_suite"
    hint = "Mend the lines and send the suite again; docs/evaluation.md shows every scorer."

    _MOST_SHOWN = 50

    def __init__(self, problems: list[tuple[int, str]], *, param: str) -> None:
        shown = "; ".join(f"line {number}: {problem}" for number, problem in problems[: self._MOST_SHOWN])
        more = len(problems) - self._MOST_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        super().__init__(f"{len(problems)} lines are wrong: {shown}{rest}", param=param)


class RunsNotComparable(InvalidRequest):
    """The runs answered different questions, or were drawn in different ways."""

    code = "runs_not_comparable"
    hint = "Run both versions on the same version of the suite, with the same sampling."


class RunNotFinished(KilnError):
    """Two runs can be compared once both have all their answers, and this one has not."""

    code = "eval_run_not_finished"
    kind = ErrorKind.CONFLICT
    hint = "Wait until GET /v1/evals/runs/{id} says succeeded."
