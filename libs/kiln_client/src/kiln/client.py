"""For the client that blocks; written from aio.py by scripts/generate_sync_client.py."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import httpx
from typing_extensions import Unpack

from kiln import calls
from kiln.call import Call, Connection, SseReader, connecting, raise_for_status
from kiln.data import Corrections, Datasets, Evals
from kiln.errors import KilnError
from kiln.progress import ProgressLine
from kiln.values import (
    Adapter,
    AdapterVersion,
    JobEvent,
    JobOptions,
    JobState,
    JsonObject,
    Prompt,
    Reward,
    Rollout,
)
from kiln.watching import EventCursor, check_outcome

if TYPE_CHECKING:
    import openai

T = TypeVar("T")


class Client:
    """Talks to one Kiln server. A request is made once: nothing is tried again behind your back.

    Raises, from every method: the ApiError of the server's refusal, ConnectionFailed.
    """

    def __init__(
        self, base_url: str | None = None, *, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        """`base_url` and `api_key` default to KILN_URL (or http://127.0.0.1:8420) and KILN_API_KEY."""
        self._connection = Connection.of(base_url, api_key, timeout_s)
        self._http = httpx.Client(**self._connection.http_options())
        self.train = Train(self)
        self.adapters = Adapters(self)
        self.datasets = Datasets(self)
        self.corrections = Corrections(self)
        self.evals = Evals(self)

    @property
    def base_url(self) -> str:
        return self._connection.base_url

    @functools.cached_property
    def openai(self) -> openai.OpenAI:
        """The openai client on this server: chat, completions, embeddings, responses."""
        import openai  # takes a second to import, and not everyone needs it

        return openai.OpenAI(**self._connection.openai_options(), timeout=self._connection.timeout_s)

    def rollouts(self, prompts: Prompt | Sequence[Prompt], *, n: int = 1, **sampling: Any) -> list[Rollout]:
        """`n` answers to each prompt, drawn together at temperature 1 unless `sampling` says otherwise.

        A prompt is a user message's text or a list of messages. `sampling` takes the fields of a chat
        request, such as model="helpful@3", max_tokens=200, temperature=0.7.
        """
        return self.send(calls.rollouts(prompts, n, sampling))

    def models(self) -> list[JsonObject]:
        """What a request may put in `model`; the base model first."""
        return self.send(calls.list_models())

    def health(self) -> JsonObject:
        """Model, engines, scheduler, training, adapters; `status` is ok, degraded or unavailable."""
        return self.send(calls.health())

    def send(self, call: Call[T]) -> T:
        """Make one request; what comes back is parsed."""
        with connecting(self.base_url):
            response = self._http.request(call.method, call.path, **call.options)
        if response.status_code not in call.answers_with:
            raise_for_status(response)
        return call.parse(response)

    def request(self, method: str, path: str, **options: Any) -> JsonObject:
        """Any route; `options` go to httpx, and the answer's JSON comes back."""
        return self.send(Call(method, path, lambda response: response.json(), options))

    @contextlib.contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """An answer whose body has not been read; it is closed with the block."""
        with connecting(self.base_url):
            with self._http.stream(method, path, **options) as response:
                if response.status_code >= 400:
                    response.read()
                    raise_for_status(response)
                yield response

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Train:
    """`client.train`: submits jobs and finds them again."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def grpo(
        self,
        adapter: str,
        rollouts: Sequence[Rollout] = (),
        rewards: Sequence[Reward] = (),
        *,
        groups: Sequence[JsonObject] | None = None,
        dataset: str | None = None,
        loss: JsonObject | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Learn from rewards: one for each rollout, `groups` as docs/api.md has them, or a data set's id."""
        data: JsonObject = {"dataset": dataset}
        if dataset is None:
            data = {"groups": list(groups) if groups is not None else calls.grpo_groups(rollouts, rewards)}
        body = {"adapter": adapter, **data, **({"loss": loss} if loss else {}), **options}
        return self.submit("grpo", body, idempotency_key)

    def sft(
        self,
        adapter: str,
        examples: Sequence[JsonObject] | None = None,
        *,
        dataset: str | None = None,
        corrections: Literal["unused"] | Sequence[str] | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Learn from examples (conversations, or pairs of prompt and completion), an uploaded data set,
        corrections by their ids, or all of these that no job has learned yet.
        """
        given = {"examples": examples, "dataset": dataset, "corrections": corrections}
        data = {name: value for name, value in given.items() if value is not None}
        return self.submit("sft", {"adapter": adapter, **data, **options}, idempotency_key)

    def opd(
        self,
        adapter: str,
        prompts: Sequence[Prompt] | None = None,
        *,
        teacher: str | Mapping[str, Any],
        groups: Sequence[JsonObject] | None = None,
        rollout: JsonObject | None = None,
        divergence: str | JsonObject = "reverse_kl",
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Learn from a teacher's judgement of what the student writes to `prompts` (or wrote in `groups`)."""
        body = {"adapter": adapter, "teacher": teacher, "divergence": divergence, **options}
        given = {"prompts": prompts, "groups": groups, "rollout": rollout}
        body |= {name: value for name, value in given.items() if value is not None}
        return self.submit("opd", body, idempotency_key)

    def submit(self, recipe: str, body: JsonObject, idempotency_key: str | None = None) -> Job:
        """POST /v1/train/{recipe} with any body. The same key and body never make a second job."""
        return Job(self._client, self._client.send(calls.submit_job(recipe, body, idempotency_key)))

    def job(self, job_id: str) -> Job:
        """A job by its id."""
        return Job(self._client, self._client.send(calls.get_job(job_id)))

    def jobs(self, limit: int = 100) -> list[Job]:
        """The newest first."""
        return [Job(self._client, state) for state in self._client.send(calls.list_jobs(limit))]

    def status(self) -> JsonObject:
        """The trainer: what it runs, how much waits, whose weights it maps."""
        return self._client.send(calls.get("/v1/train/status"))


class Job:
    """A training job. `state` is what the server said last; `refresh` asks again."""

    def __init__(self, client: Client, state: JobState) -> None:
        self._client = client
        self.state = state

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.status})"

    @property
    def id(self) -> str:
        return self.state.id

    @property
    def status(self) -> str:
        return self.state.status

    @property
    def version(self) -> str | None:
        """The version it published, "name@version"."""
        return self.state.version

    def refresh(self) -> Job:
        self.state = self._client.send(calls.get_job(self.id))
        return self

    def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> Job:
        """Until it has ended and, having succeeded, its version answers. Times out within 15 s more.

        Raises:
            JobFailed, JobCancelled, GateNotPassed: it ended so.
            WaitTimedOut: it goes on after `timeout_s`.
        """
        line = ProgressLine(self.id) if progress else None
        with contextlib.closing(self.events(timeout_s=timeout_s)) as events:
            for event in events:
                if line is not None:
                    line.show(event)
        self.refresh()
        check_outcome(self.state)
        return self

    def events(self, *, timeout_s: float | None = None, patience_s: float = 60.0) -> Generator[JobEvent]:
        """What happened and happens, from the start until it has ended.

        A connection that breaks is taken up where it broke off, for up to `patience_s`.
        """
        cursor = EventCursor(self.id, patience_s=patience_s, timeout_s=timeout_s)
        while not cursor.has_ended:
            broke: KilnError | None = None
            try:
                with contextlib.closing(self._events_once(cursor)) as events:
                    for event in events:
                        yield event
            except KilnError as error:
                broke = error
            if not cursor.has_ended:
                time.sleep(cursor.broke_off(broke))

    def _events_once(self, cursor: EventCursor) -> Generator[JobEvent]:
        reader = SseReader()
        with self._client.stream("GET", calls.job_events_path(self.id), **cursor.request()) as response:
            for line in response.iter_lines():
                raw = reader.feed(line)
                if raw is not None:
                    yield cursor.saw(raw)
                cursor.check_deadline()

    def cancel(self, *, discard: bool = False) -> Job:
        """At once while it waits, at the next step boundary while it runs.

        With `discard`, versions that it published on its way are taken back.
        """
        self.state = self._client.send(calls.cancel_job(self.id, discard))
        return self

    def retry(self, *, idempotency_key: str | None = None, **changes: Any) -> Job:
        """A new job of the same data, with the settings in `changes`."""
        return Job(self._client, self._client.send(calls.retry_job(self.id, changes, idempotency_key)))

    def receipt(self) -> JsonObject:
        """All that is needed to run it again and compare."""
        return self._client.send(calls.job_receipt(self.id))


class Adapters:
    """`client.adapters`: names, versions, and which one answers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> list[Adapter]:
        return self._client.send(calls.list_adapters())

    def get(self, name: str) -> Adapter:
        return self._client.send(calls.get_adapter(name))

    def attach(self, name: str, version: int | None = None) -> JsonObject:
        """Let a version (the latest unless one is named) answer for the base model's id."""
        return self._client.send(calls.attach_adapter(name, version))

    def detach(self) -> JsonObject:
        """Let the bare base model answer again."""
        return self._client.send(calls.detach_adapter())

    def rollback(self, name: str, version: int) -> JsonObject:
        """Let an older version be the name's latest again, from the next request on."""
        return self._client.send(calls.roll_back_adapter(name, version))

    def diff(self, name: str, from_version: int | None = None, to_version: int | None = None) -> JsonObject:
        return self._client.send(calls.diff_adapter(name, from_version, to_version))

    def merge(
        self,
        sources: Mapping[str, float],
        output: str,
        *,
        mode: str = "linear",
        idempotency_key: str | None = None,
    ) -> JsonObject:
        """One new adapter out of several: {"name@version": weight}; mode is linear, ties or concat."""
        return self._client.send(calls.merge_adapters(sources, output, mode, idempotency_key))

    def delete(self, reference: str) -> JsonObject:
        """A name with all its versions, or "name@version". Raises ConflictError while it is attached."""
        return self._client.send(calls.delete_adapter(reference))

    def upload(
        self, name: str, source: str | Path, *, attach: bool = False, idempotency_key: str | None = None
    ) -> AdapterVersion:
        """Publish a PEFT folder, or an archive of one, as a new version of `name`."""
        files = calls.adapter_files(source)
        return self._client.send(calls.upload_adapter(name, files, attach, idempotency_key))

    def download(self, name: str, target: str | Path, version: int | None = None) -> Path:
        """Write a version's PEFT folder as tar.gz to the file `target`; whole, or not at all."""
        path = Path(target)
        partial = path.with_name(f"{path.name}.partial")
        params = {} if version is None else {"version": version}
        with self._client.stream("GET", calls.download_path(name), params=params) as response:
            with partial.open("wb") as file:
                for piece in response.iter_bytes():
                    file.write(piece)
        return partial.rename(path)
