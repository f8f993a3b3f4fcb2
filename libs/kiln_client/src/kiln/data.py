"""For the client that blocks; written from aio_data.py by scripts/generate_sync_client.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiln import calls
from kiln.errors import EvalFailed, WaitTimedOut
from kiln.values import JsonObject

if TYPE_CHECKING:
    from kiln.client import Client

_POLL_S = 0.5


class Datasets:
    """`client.datasets`: uploaded JSONL, which `train.sft(…, dataset=id)` learns from."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def upload(self, source: str | Path, *, name: str = "", format: str = "") -> JsonObject:
        """Send a JSONL file; the server checks every row and keeps all of them or none.

        `format` is chat, prompt_completion, mixed or rollouts; the rows decide when it is left out.

        Raises:
            InvalidRequestError: rows are broken; the message has their lines.
        """
        with Path(source).expanduser().open("rb") as file:
            return self._client.send(calls.upload_dataset(file.read(), name, format))

    def list(self) -> list[JsonObject]:
        """The newest first."""
        return self._client.send(calls.list_datasets())

    def get(self, dataset_id: str) -> JsonObject:
        return self._client.send(calls.get_dataset(dataset_id))

    def sample(self, dataset_id: str, n: int = 5, seed: int = 0) -> Sequence[JsonObject]:
        """Some rows, drawn at random, with their lines."""
        return self._client.send(calls.sample_dataset(dataset_id, n, seed))

    def delete(self, dataset_id: str) -> JsonObject:
        return self._client.send(calls.delete_dataset(dataset_id))


class Corrections:
    """`client.corrections`: what answers should have been, which `train.sft(…, corrections="unused")` learns."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def add(self, completion_id: str, correction: str, index: int = 0) -> JsonObject:
        """Say what a kept answer should have been."""
        return self._client.send(calls.add_correction(completion_id, correction, index))

    def list(self) -> list[JsonObject]:
        return self._client.send(calls.list_corrections())

    def delete(self, correction_id: str) -> JsonObject:
        return self._client.send(calls.delete_correction(correction_id))


class Evals:
    """`client.evals`: suites of cases, runs over adapter versions, comparisons of two runs."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def put_suite(self, name: str, cases: str | Sequence[JsonObject]) -> JsonObject:
        """Keep a suite, as JSONL text or as a list, as the next version of its name."""
        return self._client.send(calls.put_suite(name, cases))

    def suites(self) -> list[JsonObject]:
        """The newest version of each."""
        return self._client.send(calls.list_suites())

    def run(
        self, suite: str, model: str | None = None, *, idempotency_key: str | None = None, **sampling: Any
    ) -> EvalRun:
        """Answer a suite with an adapter, name@version or "base" (what answers by default when left out).

        `sampling` takes max_tokens, temperature, top_p, seed and thinking.
        """
        raw = self._client.send(calls.start_eval(suite, model, sampling, idempotency_key))
        return EvalRun(self._client, raw)

    def get_run(self, run_id: str, *, cases: bool = False) -> EvalRun:
        """A run by its id; with `cases`, every answer and how it was scored."""
        return EvalRun(self._client, self._client.send(calls.get_eval(run_id, cases)))

    def runs(self, model: str | None = None, *, status: str | None = None, limit: int = 100) -> list[EvalRun]:
        """The newest runs first, without cases: all, or those on an adapter, name@version or "base"."""
        found = self._client.send(calls.list_evals(model, status, limit))
        return [EvalRun(self._client, raw) for raw in found]

    def delete_run(self, run_id: str) -> JsonObject:
        """Forget a run; one that is not over ends."""
        return self._client.send(calls.delete_eval(run_id))

    def compare(self, baseline_run_id: str, candidate_run_id: str) -> JsonObject:
        """Two runs over the same suite, case by case: the difference and how sure it is."""
        return self._client.send(calls.compare_evals(baseline_run_id, candidate_run_id))


class EvalRun:
    """One run of a suite. `raw` is what the server said last."""

    def __init__(self, client: Client, raw: JsonObject) -> None:
        self._client = client
        self.raw = raw

    def __repr__(self) -> str:
        return f"EvalRun({self.id!r}, {self.status})"

    @property
    def id(self) -> str:
        return self.raw["id"]

    @property
    def status(self) -> str:
        """queued, running, succeeded or failed."""
        return self.raw["status"]

    @property
    def score(self) -> JsonObject | None:
        """Mean and confidence interval, once it has succeeded."""
        return self.raw.get("score")

    def refresh(self, *, cases: bool = False) -> EvalRun:
        self.raw = self._client.send(calls.get_eval(self.id, cases))
        return self

    def wait(
        self, *, timeout_s: float | None = None, on_progress: Callable[[int, int], None] | None = None
    ) -> EvalRun:
        """Until it has ended; `on_progress(done, cases)` is called now and then. It has no events: it is polled.

        Raises:
            EvalFailed: it could not be carried out.
            WaitTimedOut: it goes on after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.status not in ("succeeded", "failed"):
            if deadline is not None and time.monotonic() > deadline:
                raise WaitTimedOut(f"run {self.id} has not ended within {timeout_s:g} s")
            time.sleep(_POLL_S)
            self.refresh()
            if on_progress is not None:
                progress = self.raw.get("progress") or {}
                on_progress(progress.get("done", 0), progress.get("cases", 0))
        if self.status == "failed":
            raise EvalFailed(self.raw)
        return self
