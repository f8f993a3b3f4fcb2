"""Suites and runs in the catalogue's database. Each method is one transaction; time comes in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    Select,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from kiln_common.adapter_names import InvalidAdapterName, parse_reference
from kiln_common.errors import IdempotencyConflict
from kiln_common.ids import new_id
from kiln_common.pb import evaluations_pb2 as pb
from kiln_registry import schema
from kiln_registry.evaluations.errors import (
    EvalClaimLost,
    EvalRunCrashed,
    EvalRunNotFound,
    EvalSuiteNotFound,
    InvalidSuiteName,
)
from kiln_registry.evaluations.tables import cases, runs, suites

_MAX_IDLE_CLAIMS = 3
_MOST_LISTED = 500
_SUITE_FIELDS = ("id", "name", "version", "sha256", "num_cases", "created_at_s")
_RUN_FIELDS = (
    *("id", "owner", "adapter", "settings_json", "job_id", "status", "summary_json"),
    *("created_at_s", "started_at_s", "finished_at_s", "claim_epoch"),
)
_SUBMITTED_FIELDS = ("owner", "suite_id", "adapter", "settings_json", "job_id")
T = TypeVar("T")


class EvaluationStore:
    """Owns the tables of suites, runs and cases. Thread-safe.

    A run is carried out by whoever holds its claim: a lease that each report renews. When it runs
    out, the next runner gets the run with the cases that are done; a report of an earlier claim is
    refused. A run that three runners in a row left without one more case has failed.
    """

    def __init__(self, engine: Engine) -> None:
        schema.metadata.create_all(engine)
        self._engine = engine
        self._reader = schema.reader(engine)

    def put_suite(self, request: pb.PutSuiteRequest, now_s: float) -> pb.EvalSuite:
        """Raises InvalidSuiteName."""
        try:
            is_bare = parse_reference(request.name).version is None
        except InvalidAdapterName:
            is_bare = False
        if not is_bare:
            raise InvalidSuiteName(f"{request.name[:140]!r} is not a suite's name")
        sha256 = hashlib.sha256(request.content.encode()).hexdigest()
        is_same_name = (suites.c.owner == request.owner) & (suites.c.name == request.name)

        def put(connection: Connection) -> pb.EvalSuite:
            query = _select_suites().where(is_same_name, suites.c.sha256 == sha256)
            known = connection.execute(query).mappings().first()
            if known is not None:
                return _suite(known)
            last = connection.scalar(select(func.max(suites.c.version)).where(is_same_name)) or 0
            row = {
                "id": new_id("suite"), "owner": request.owner, "name": request.name, "version": last + 1,
                "sha256": sha256, "num_cases": request.num_cases, "created_at_s": now_s,
                "content": request.content,
            }  # fmt: skip
            connection.execute(insert(suites).values(**row))
            return _suite(row)

        return self._write(put)

    def get_suite(self, owner: str, reference: str, *, with_content: bool) -> pb.EvalSuite:
        """Raises EvalSuiteNotFound."""
        with self._reader.begin() as connection:
            query = _suite_query(owner, reference, with_content=with_content)
            row = connection.execute(query).mappings().first()
        if row is None:
            raise EvalSuiteNotFound(f"there is no suite {reference[:160]!r}")
        return _suite(row, with_content=with_content)

    def list_suites(self, owner: str) -> list[pb.EvalSuite]:
        with self._reader.begin() as connection:
            query = _select_suites().where(suites.c.owner == owner)
            query = query.order_by(suites.c.name, suites.c.version)
            newest = {row["name"]: row for row in connection.execute(query).mappings()}
        return [_suite(row) for row in newest.values()]

    def submit_run(self, request: pb.SubmitRunRequest, now_s: float) -> pb.EvalRun:
        """Raises EvalSuiteNotFound, and IdempotencyConflict where the key made another run."""
        key = request.idempotency_key or None
        body = {name: getattr(request, name) for name in _SUBMITTED_FIELDS}

        def submit(connection: Connection) -> str:
            if key is not None:
                query = select(runs).where(runs.c.idempotency_key == key)
                known = connection.execute(query).mappings().first()
                if known is not None and any(known[name] != value for name, value in body.items()):
                    raise IdempotencyConflict(f"the idempotency key {key[:80]!r} was used for another run")
                if known is not None:
                    return known["id"]
            if connection.scalar(select(suites.c.id).where(suites.c.id == request.suite_id)) is None:
                raise EvalSuiteNotFound(f"there is no suite {request.suite_id[:160]!r}")
            run_id = new_id("evalrun")
            row = {"id": run_id, "idempotency_key": key, "status": "queued", "created_at_s": now_s}
            connection.execute(insert(runs).values(**row, **body))
            return run_id

        return self._get(self._write(submit))

    def get_run(self, run_id: str, owner: str, *, with_cases: bool) -> pb.EvalRun:
        """Raises EvalRunNotFound."""
        run = self._get(run_id, with_cases=with_cases)
        if run.owner != owner:
            raise _no_run(run_id)
        return run

    def list_runs(self, request: pb.ListRunsRequest) -> list[pb.EvalRun]:
        """The newest runs of an owner, newest first, without cases."""
        newest = select(runs).where(runs.c.owner == request.owner)
        if request.adapters:
            newest = newest.where(or_(*map(_is_on, request.adapters)))
        if request.statuses:
            newest = newest.where(runs.c.status.in_(request.statuses))
        newest = newest.order_by(runs.c.created_at_s.desc(), runs.c.id).limit(
            min(request.limit or _MOST_LISTED, _MOST_LISTED)
        )
        with self._reader.begin() as connection:
            rows = connection.execute(newest).mappings().all()
            query = _select_suites().where(suites.c.id.in_({row["suite_id"] for row in rows}))
            suite_of = {row["id"]: _suite(row) for row in connection.execute(query).mappings()}
            is_listed = cases.c.run_id.in_([row["id"] for row in rows])
            counts = select(cases.c.run_id, func.count().label("num")).where(is_listed)
            counted = connection.execute(counts.group_by(cases.c.run_id))
            num_done = {row.run_id: row.num for row in counted}
        return [_run(row, suite_of[row["suite_id"]], num_done.get(row["id"], 0)) for row in rows]

    def delete_run(self, run_id: str, owner: str) -> None:
        """Forget a run and its cases, whatever its status. Raises EvalRunNotFound."""

        def forget(connection: Connection) -> None:
            is_it = (runs.c.id == run_id) & (runs.c.owner == owner)
            if connection.scalar(select(runs.c.id).where(is_it).with_for_update()) is None:
                raise _no_run(run_id)
            connection.execute(delete(cases).where(cases.c.run_id == run_id))
            connection.execute(delete(runs).where(is_it))

        self._write(forget)

    def claim_run(self, lease_s: float, now_s: float) -> pb.EvalRun | None:
        """The oldest run that waits or whose lease has run out, with content and finished cases."""
        is_free = runs.c.status.in_(("queued", "running")) & (runs.c.lease_ends_s <= now_s)
        oldest = select(runs).where(is_free).order_by(runs.c.created_at_s, runs.c.id).limit(1)

        def claim(connection: Connection) -> str | None:
            while (row := connection.execute(oldest.with_for_update()).mappings().first()) is not None:
                this = update(runs).where(runs.c.id == row["id"])
                if row["num_idle_claims"] >= _MAX_IDLE_CLAIMS:
                    crash = EvalRunCrashed(
                        f"{_MAX_IDLE_CLAIMS} gateways in a row left the run without a result"
                    )
                    error = {"code": crash.code, "message": str(crash), "hint": crash.hint}
                    connection.execute(
                        this.values(status="failed", error_json=json.dumps(error), finished_at_s=now_s)
                    )
                    continue
                connection.execute(
                    this.values(
                        status="running",
                        started_at_s=row["started_at_s"] or now_s,
                        claim_epoch=row["claim_epoch"] + 1,
                        lease_ends_s=now_s + lease_s,
                        num_idle_claims=row["num_idle_claims"] + 1,
                    )
                )
                return row["id"]
            return None

        with self._reader.begin() as connection:  # gateways ask often, and mostly in vain
            if connection.execute(oldest).first() is None:
                return None
        run_id = self._write(claim)
        if run_id is None:
            return None
        run = self._get(run_id, with_cases=True, with_content=True)
        for case in run.cases:  # what was said is of no use to who goes on
            case.ClearField("answer")
            case.ClearField("detail")
        return run

    def report_cases(self, request: pb.ReportCasesRequest, now_s: float) -> None:
        """Keep results, of which the last of a case counts. Raises EvalClaimLost."""

        def report(connection: Connection) -> None:
            _check_claim(connection, request.run_id, request.claim_epoch)
            _put_cases(connection, request.run_id, request.cases)
            fields: dict[str, Any] = {"lease_ends_s": now_s + request.lease_s}
            if request.cases or not request.lease_s:  # a runner that gives the run back did not crash
                fields["num_idle_claims"] = 0
            connection.execute(update(runs).where(runs.c.id == request.run_id).values(**fields))

        self._write(report)

    def finish_run(self, request: pb.FinishRunRequest, now_s: float) -> pb.EvalRun:
        """Raises EvalClaimLost."""
        has_failed = request.HasField("error")
        status = "failed" if has_failed else "succeeded"
        error = {name: getattr(request.error, name) for name in ("code", "message", "hint")}

        def finish(connection: Connection) -> None:
            _check_claim(connection, request.run_id, request.claim_epoch, also=status)
            connection.execute(
                update(runs)
                .where(runs.c.id == request.run_id)
                .values(
                    status=status,
                    summary_json=request.summary_json,
                    error_json=json.dumps(error) if has_failed else "",
                    finished_at_s=now_s,
                )
            )

        self._write(finish)
        return self._get(request.run_id)

    def _get(self, run_id: str, *, with_cases: bool = False, with_content: bool = False) -> pb.EvalRun:
        with self._reader.begin() as connection:
            row = connection.execute(select(runs).where(runs.c.id == run_id)).mappings().first()
            if row is None:
                raise _no_run(run_id)
            query = _select_suites(with_content=with_content).where(suites.c.id == row["suite_id"])
            suite = connection.execute(query).mappings().one()
            num_done = connection.scalar(select(func.count()).where(cases.c.run_id == run_id)) or 0
            query = select(cases).where(cases.c.run_id == run_id).order_by(cases.c.index)
            found = connection.execute(query).mappings().all() if with_cases else []
        run = _run(row, _suite(suite, with_content=with_content), num_done)
        run.cases.extend(_case(case) for case in found)
        return run

    def _write(self, change: Callable[[Connection], T]) -> T:
        return schema.write(self._engine, change)


def _no_run(run_id: str) -> EvalRunNotFound:
    return EvalRunNotFound(f"there is no evaluation run {run_id[:80]!r}")


def _select_suites(*, with_content: bool = False) -> Select[Any]:
    """A suite's content may have megabytes: it is read where it is wanted."""
    fields = (*_SUITE_FIELDS, "content") if with_content else _SUITE_FIELDS
    return select(*(suites.c[name] for name in fields))


def _suite_query(owner: str, reference: str, *, with_content: bool) -> Select[Any]:
    owned = _select_suites(with_content=with_content).where(suites.c.owner == owner)
    if reference.startswith("suite_"):
        return owned.where(suites.c.id == reference)
    name, _, version = reference.partition("@")
    query = owned.where(suites.c.name == name).order_by(suites.c.version.desc()).limit(1)
    if version:
        query = query.where(suites.c.version == (int(version) if version.isdecimal() else 0))
    return query


def _check_claim(connection: Connection, run_id: str, claim_epoch: int, *, also: str = "running") -> None:
    query = select(runs.c.status, runs.c.claim_epoch).where(runs.c.id == run_id).with_for_update()
    row = connection.execute(query).first()
    if row is None or row.claim_epoch != claim_epoch or row.status not in ("running", also):
        raise EvalClaimLost(f"claim {claim_epoch} of {run_id} is not the last one, or the run is over")


def _put_cases(connection: Connection, run_id: str, results: Sequence[pb.EvalCase]) -> None:
    rows = [{"run_id": run_id, **{name: getattr(case, name) for name in _CASE_FIELDS}} for case in results]
    if rows:
        indexes = [row["index"] for row in rows]
        connection.execute(delete(cases).where(cases.c.run_id == run_id, cases.c.index.in_(indexes)))
        connection.execute(insert(cases), rows)


_CASE_FIELDS = ("index", "score", "is_valid", "answer", "detail")


def _suite(row: RowMapping | dict[str, Any], *, with_content: bool = False) -> pb.EvalSuite:
    suite = pb.EvalSuite(**{name: row[name] for name in _SUITE_FIELDS})
    if with_content:
        suite.content = row["content"]
    return suite


def _is_on(adapter: str) -> ColumnElement[bool]:
    """Whether a run is on this version, or on any of this name. LIKE would take "Kind" for "kind" on SQLite."""
    beginning = f"{adapter}@"
    return (runs.c.adapter == adapter) | (func.substr(runs.c.adapter, 1, len(beginning)) == beginning)


def _run(row: RowMapping, suite: pb.EvalSuite, num_done: int) -> pb.EvalRun:
    run = pb.EvalRun(**{name: row[name] for name in _RUN_FIELDS}, suite=suite, num_done=num_done)
    if row["error_json"]:
        run.error.CopyFrom(pb.EvalError(**json.loads(row["error_json"])))
    return run


def _case(row: RowMapping) -> pb.EvalCase:
    return pb.EvalCase(**{name: row[name] for name in _CASE_FIELDS})
