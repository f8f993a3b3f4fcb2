"""Carries out evaluation runs, one at a time in each gateway, whichever gateway accepted them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import structlog

from kiln_common.errors import KilnError
from kiln_common.pb import evaluations_pb2
from kiln_gateway.evals.case_run import CaseRunner
from kiln_gateway.evals.report import summarise
from kiln_gateway.evals.scorers import Answer, Score
from kiln_gateway.evals.suite import parse_suite
from kiln_gateway.gateway import Gateway
from kiln_gateway.ports import EvaluationsPort
from kiln_gateway.schemas.evals import EvalCaseFields
from kiln_gateway.schemas.gate import EvalSettings
from kiln_gateway.together import together

log = structlog.get_logger()

_LEASE_S = 10.0
_REPORT_EVERY_S = 1.0
_PATIENCE_S = 300.0
_LAST_WORDS_S = 2.0
_MOST_ANSWER_CHARS = 4000


class Evaluator:
    """Claims runs at the registry, which keeps their results as they come.

    A gateway that stops gives its run back; one that dies lets its lease run out. Either way another
    gateway, or the next one of this place, goes on with the cases that are left.
    """

    def __init__(
        self, gateway: Gateway, store: EvaluationsPort, *, concurrency: int, poll_s: float = 1.0
    ) -> None:
        self._gateway = gateway
        self._store = store
        self._concurrency = concurrency
        self._poll_s = poll_s

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Carry out runs while the block runs."""
        if not self._concurrency:
            yield
            return
        task = asyncio.create_task(self._work())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _work(self) -> None:
        is_away = False  # so that one outage is one line in the log
        while True:
            run = None
            try:
                run = await self._store.claim_run(_LEASE_S)
                is_away = False
            except KilnError as error:
                if not is_away:
                    log.warning("eval_runs_not_claimed", code=error.code, reason=str(error))
                is_away = True
            if run is None:
                await asyncio.sleep(self._poll_s)
                continue
            try:
                await self._carry_out(run)
            except KilnError as error:  # the lease runs out, and somebody goes on
                log.warning("eval_run_left", run_id=run.id, code=error.code, reason=str(error))

    async def _carry_out(self, run: evaluations_pb2.EvalRun) -> None:
        """Answer what is left and end the run. Raises what the registry raises."""
        report = _Report(self._store, run)
        log.info("eval_run_claimed", run_id=run.id, adapter=run.adapter, num_done=len(run.cases))
        try:
            cases = await asyncio.to_thread(parse_suite, run.suite.content, param="suite")
            await self._answer_all(run, cases, report)
        except asyncio.CancelledError:
            with contextlib.suppress(KilnError, TimeoutError):
                await asyncio.wait_for(report.flush(lease_s=0.0), _LAST_WORDS_S)
            raise
        except KilnError as error:
            if error.code == "eval_claim_lost":
                raise
            failure = evaluations_pb2.EvalError(code=error.code, message=str(error), hint=error.hint)
            await report.flush(lease_s=_LEASE_S)
            await self._store.finish_run(run.id, run.claim_epoch, error=failure)
        except Exception as error:  # the run must end, whatever it is
            log.exception("eval_run_failed", run_id=run.id)
            failure = evaluations_pb2.EvalError(
                code=KilnError.code, message=f"{type(error).__name__}: {error}"
            )
            await self._store.finish_run(run.id, run.claim_epoch, error=failure)
        else:
            await report.flush(lease_s=_LEASE_S)
            summary = await asyncio.to_thread(summarise, cases, report.results)
            await self._store.finish_run(run.id, run.claim_epoch, summary_json=json.dumps(summary))

    async def _answer_all(
        self, run: evaluations_pb2.EvalRun, cases: list[EvalCaseFields], report: _Report
    ) -> None:
        settings = EvalSettings.model_validate_json(run.settings_json)
        runner = CaseRunner(self._gateway, run.owner, run.adapter, settings, patience_s=_PATIENCE_S)
        waiting = iter([index for index in range(len(cases)) if index not in report.results])

        async def answer_some() -> None:
            for index in waiting:
                report.add(index, *await runner.run(index, cases[index]))

        tasks = [
            asyncio.create_task(together(answer_some() for _ in range(self._concurrency))),
            asyncio.create_task(report.keep_reporting()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Report:
    """Results of a run on their way to the registry."""

    def __init__(self, store: EvaluationsPort, run: evaluations_pb2.EvalRun) -> None:
        self._store = store
        self._run = run
        self._unsent: list[evaluations_pb2.EvalCase] = []
        self.results = {case.index: case for case in run.cases}

    def add(self, index: int, answer: Answer, score: Score) -> None:
        case = evaluations_pb2.EvalCase(
            index=index,
            score=score.value,
            is_valid=score.is_valid,
            answer=_shown(answer)[:_MOST_ANSWER_CHARS],
            detail=score.detail,
        )
        self.results[index] = case
        self._unsent.append(case)

    async def flush(self, *, lease_s: float) -> None:
        """Send what was not sent, and renew the lease."""
        sending = self._unsent.copy()
        await self._store.report_cases(self._run.id, self._run.claim_epoch, sending, lease_s)
        del self._unsent[: len(sending)]

    async def keep_reporting(self) -> None:
        """Report now and then. A registry that is away gets everything when it is back."""
        is_away = False  # so that one outage is one line in the log
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            try:
                await self.flush(lease_s=_LEASE_S)
                is_away = False
            except KilnError as error:
                if error.code == "eval_claim_lost":
                    raise
                if not is_away:
                    log.warning("eval_cases_not_reported", run_id=self._run.id, code=error.code)
                is_away = True


def _shown(answer: Answer) -> str:
    """The answer for people to read: its text, then its calls."""
    return answer.text + "".join(f"\n{call.name}({call.arguments})" for call in answer.tool_calls)
