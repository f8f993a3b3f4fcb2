"""One case of a run: its answer, and the answer's score."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kiln_common.errors import AdapterMismatch, ErrorKind, KilnError
from kiln_gateway.evals.answers import draw_answer, judge
from kiln_gateway.evals.code import score_code
from kiln_gateway.evals.scorers import (
    Answer,
    Score,
    invalid,
    score_contains,
    score_exact,
    score_json_schema,
    score_multiple_choice,
    score_numeric,
    score_regex,
    score_tool_call,
)
from kiln_gateway.gateway import Gateway
from kiln_gateway.schemas.evals import CodeScorer, EvalCaseFields, JudgeScorer
from kiln_gateway.schemas.gate import EvalSettings

# A service that is away or full; anything else about the request is the case's own fault or the run's.
_PASSING = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.RATE_LIMITED, ErrorKind.TIMEOUT})
_FAULT_OF_THE_CASE = frozenset({ErrorKind.INVALID_REQUEST, ErrorKind.TOO_LARGE})
_FIRST_WAIT_S, _LAST_WAIT_S = 0.2, 5.0
_MOST_PROGRAMS = 2  # that run at once in the sandbox
T = TypeVar("T")

_BY_RULE: dict[str, Callable[..., Score]] = {
    "exact": score_exact,
    "contains": score_contains,
    "regex": score_regex,
    "numeric": score_numeric,
    "multiple_choice": score_multiple_choice,
    "json_schema": score_json_schema,
    "tool_call": score_tool_call,
}


class CaseRunner:
    """Answers and scores the cases of one run."""

    def __init__(
        self, gateway: Gateway, owner: str, adapter: str, settings: EvalSettings, *, patience_s: float
    ) -> None:
        self._gateway = gateway
        self._owner = owner
        self._adapter = adapter
        self._settings = settings
        self._patience_s = patience_s
        self._programs = asyncio.Semaphore(_MOST_PROGRAMS)

    async def run(self, index: int, case: EvalCaseFields) -> tuple[Answer, Score]:
        """A case that cannot be asked or judged (its prompt is too long, say) is invalid.

        Raises:
            KilnError: what would befall every case: no engine for `patience_s`, no such adapter, no sandbox.
        """
        settings = self._settings.model_copy(update={"seed": (self._settings.seed + index) % 2**63})
        answer = Answer("")
        try:
            answer = await self._patiently(
                lambda: draw_answer(self._gateway, self._owner, case, self._adapter, settings)
            )
            return answer, await self._score(case, answer, settings.seed)
        except KilnError as error:
            if error.kind not in _FAULT_OF_THE_CASE or error.code == AdapterMismatch.code:
                raise
            return answer, invalid(f"{error.code}: {error}")

    async def _score(self, case: EvalCaseFields, answer: Answer, seed: int) -> Score:
        scorer = case.scorer
        if isinstance(scorer, JudgeScorer):
            return await self._patiently(
                lambda: judge(self._gateway, self._owner, scorer, case, answer, seed)
            )
        if isinstance(scorer, CodeScorer):
            async with self._programs:
                return await asyncio.to_thread(score_code, scorer, answer)
        return await asyncio.to_thread(_BY_RULE[scorer.type], scorer, answer)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Ask again while a service is away or full."""
        deadline_s: float | None = None
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await call()
            except KilnError as error:
                now_s = time.monotonic()
                deadline_s = deadline_s or now_s + self._patience_s
                if error.kind not in _PASSING or now_s + wait_s > deadline_s:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_WAIT_S)
