"""From the options of `kiln train sft|grpo|opd` to a job, and to its end."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kiln
from kiln_cli import exit_codes
from kiln_cli.errors import NoTrainingData
from kiln_cli.session import Session
from kiln_cli.train.jsonl import Row, grpo_groups, line_of_field, read_rows


@dataclass(frozen=True)
class Following:
    """What happens after a job was accepted."""

    detach: bool
    idempotency_key: str | None


def sft_data(file: str | None, dataset: str | None, corrections: bool) -> tuple[dict[str, Any], list[int]]:
    """The body's data, and the file's lines that its entries stand on. Raises NoTrainingData."""
    learned = {"corrections": "unused"} if corrections else {}
    if file is None and dataset is None and corrections:
        return learned, []
    check_is_one(file, dataset)
    if dataset is not None:
        return {"dataset": dataset, **learned}, []
    rows = read_rows(file or "-")
    return {"examples": [row.fields for row in rows], **learned}, [row.line for row in rows]


def grpo_data(file: str | None, dataset: str | None) -> tuple[dict[str, Any], list[int]]:
    """The same for groups. Raises NoTrainingData."""
    check_is_one(file, dataset)
    if dataset is not None:
        return {"dataset": dataset}, []
    groups, lines = grpo_groups(file or "-", read_rows(file or "-"))
    return {"groups": groups}, lines


def check_is_one(file: str | None, dataset: str | None) -> None:
    """Raises NoTrainingData unless one of them is given."""
    if (file is None) == (dataset is None):
        raise NoTrainingData("give either a file or --dataset")


def opd_data(file: str) -> tuple[dict[str, Any], list[int]]:
    """Prompts to sample; rows with completions are groups that are there already."""
    rows = read_rows(file)
    name = "groups" if any(_is_group(row) for row in rows) else "prompts"
    return {name: [row.fields for row in rows]}, [row.line for row in rows]


def _is_group(row: Row) -> bool:
    return "completions" in row.fields or "rollouts" in row.fields


def submit(
    session: Session, recipe: str, body: dict[str, Any], lines: list[int], following: Following
) -> int:
    """Submit the job and follow it; the exit code says how it ended."""

    def send(key: str) -> kiln.Job:
        try:
            return session.client.train.submit(recipe, body, key)
        except kiln.InvalidRequestError as error:
            line = line_of_field(error.param, lines)
            if line is not None:
                error.message = f"line {line}: {error.message}"
            raise

    return accepted(session, send_once(session, following, send), following)


def send_once(session: Session, following: Following, send: Callable[[str], kiln.Job]) -> kiln.Job:
    """The job that `send` makes under the key given, or one made up. Where nobody can know whether the
    job was accepted, the error says the key: the same command with it never makes a second job.
    """
    key = following.idempotency_key or uuid.uuid4().hex
    try:
        return send(key)
    except kiln.KilnError as error:
        if exit_codes.of_client_error(error) in (exit_codes.UNREACHABLE, exit_codes.SERVER_FAILED):
            session.out.about["idempotency_key"] = key
            session.out.note(f"--idempotency-key {key} with the same command never makes a second job")
        raise


def accepted(session: Session, job: kiln.Job, following: Following) -> int:
    """Follow the new job, or print its id; first what is odd about it."""
    session.out.warn(job.state.warnings)
    if not following.detach:
        return follow(session, job)

    def show(console: Any) -> None:
        console.print(job.id, markup=False)
        session.out.note(f"kiln train watch {job.id} follows it")

    session.out.answer(job.state.raw, show)
    return exit_codes.DONE


def follow(session: Session, job: kiln.Job) -> int:
    """Watch the job to its end and say how that was. Ctrl-C leaves the job alone."""
    from kiln_cli.train.live_view import watch

    session.out.about["job_id"] = job.id
    goes_on = f"{job.id} goes on; kiln train watch {job.id} follows it, cancel ends it"
    try:
        state = _until_end(job) if session.out.as_json else watch(job, session.out.errors)
    except KeyboardInterrupt:
        session.out.note(f"\n{goes_on}")
        if session.out.as_json:
            session.out.error("interrupted", goes_on)
        return exit_codes.INTERRUPTED
    except kiln.KilnError:
        session.out.note(f"\nlost sight of {job.id}; kiln train watch {job.id} follows it again")
        raise
    session.out.answer(state.raw, lambda console: console.print(outcome(state), markup=False))
    is_as_asked = state.status == "succeeded" and state.gate_passed is not False
    return exit_codes.DONE if is_as_asked else exit_codes.NO


def _until_end(job: kiln.Job) -> kiln.JobState:
    for _ in job.events():
        pass
    return job.refresh().state


def outcome(state: kiln.JobState) -> str:
    """How a job ended, in a line."""
    if state.gate_passed is False:
        return _gate_not_passed(state)
    if state.status == "succeeded":
        return _published(state) if state.version else "succeeded; nothing was published"
    if state.status == "failed":
        error = state.error or {}
        hint = f"\n  {error['hint']}" if error.get("hint") else ""
        return f"failed: {error.get('message')} ({error.get('code')}){hint}"
    return f"{state.status} at step {state.step} of {state.num_steps}"


def _published(state: kiln.JobState) -> str:
    not_live = (state.result or {}).get("not_live") or []
    where = f", not yet on {', '.join(not_live)}" if not_live else ""
    is_attached = state.raw.get("effective_config", {}).get("attach", True)
    how = ", and answers by default"
    if not is_attached:
        how = f" by name; kiln adapters attach {state.version} makes it the default"
    return f"{state.version} is live{where}{how}"


def _gate_not_passed(state: kiln.JobState) -> str:
    name = state.raw.get("effective_config", {}).get("adapter", "its adapter's name")
    return (
        f"the gate was not passed: {(state.result or {})['gate']['reason']}\n"
        f"  nothing was published as {name}; what the job learned is kept as {state.version}"
    )
