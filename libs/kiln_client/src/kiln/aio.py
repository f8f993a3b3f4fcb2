"""The client to await; client.py, the one that blocks, is generated from this file."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import httpx
from typing_extensions import Unpack

from kiln import calls
from kiln.aio_data import AsyncCorrections, AsyncDatasets, AsyncEvals
from kiln.call import Call, Connection, SseReader, connecting, raise_for_status
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


class AsyncClient:
    """Talks to one Kiln server. A request is made once: nothing is tried again behind your back.

    Raises, from every method: the ApiError of the server's refusal, ConnectionFailed.
    """

    def __init__(
        self, base_url: str | None = None, *, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        """`base_url` and `api_key` default to KILN_URL (or http://127.0.0.1:8420) and KILN_API_KEY."""
        self._connection = Connection.of(base_url, api_key, timeout_s)
        self._http = httpx.AsyncClient(**self._connection.http_options())
        self.train = AsyncTrain(self)
        self.adapters = AsyncAdapters(self)
        self.datasets = AsyncDatasets(self)
        self.corrections = AsyncCorrections(self)
        self.evals = AsyncEvals(self)

    @property
    def base_url(self) -> str:
        return self._connection.base_url

    @functools.cached_property
    def openai(self) -> openai.AsyncOpenAI:
        """The openai client on this server: chat, completions, embeddings, responses."""
        import openai  # takes a second to import, and not everyone needs it

        return openai.AsyncOpenAI(**self._connection.openai_options(), timeout=self._connection.timeout_s)

    async def rollouts(
        self, prompts: Prompt | Sequence[Prompt], *, n: int = 1, **sampling: Any
    ) -> list[Rollout]:
        """`n` answers to each prompt, drawn together at temperature 1 unless `sampling` says otherwise.

        A prompt is a user message's text or a list of messages. `sampling` takes the fields of a chat
        request, such as model="helpful@3", max_tokens=200, temperature=0.7.
        """
        return await self.send(calls.rollouts(prompts, n, sampling))

    async def models(self) -> list[JsonObject]:
        """What a request may put in `model`; the base model first."""
        return await self.send(calls.list_models())

    async def health(self) -> JsonObject:
        """Model, engines, scheduler, training, adapters; `status` is ok, degraded or unavailable."""
        return await self.send(calls.health())

    async def send(self, call: Call[T]) -> T:
        """Make one request; what comes back is parsed."""
        with connecting(self.base_url):
            response = await self._http.request(call.method, call.path, **call.options)
        if response.status_code not in call.answers_with:
            raise_for_status(response)
        return call.parse(response)

    async def request(self, method: str, path: str, **options: Any) -> JsonObject:
        """Any route; `options` go to httpx, and the answer's JSON comes back."""
        return await self.send(Call(method, path, lambda response: response.json(), options))

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **options: Any) -> AsyncIterator[httpx.Response]:
        """An answer whose body has not been read; it is closed with the block."""
        with connecting(self.base_url):
            async with self._http.stream(method, path, **options) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise_for_status(response)
                yield response

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class AsyncTrain:
    """`client.train`: submits jobs and finds them again."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def grpo(
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
    ) -> AsyncJob:
        """Learn from rewards: one for each rollout, `groups` as docs/api.md has them, or a data set's id."""
        data: JsonObject = {"dataset": dataset}
        if dataset is None:
            data = {"groups": list(groups) if groups is not None else calls.grpo_groups(rollouts, rewards)}
        body = {"adapter": adapter, **data, **({"loss": loss} if loss else {}), **options}
        return await self.submit("grpo", body, idempotency_key)

    async def sft(
        self,
        adapter: str,
        examples: Sequence[JsonObject] | None = None,
        *,
        dataset: str | None = None,
        corrections: Literal["unused"] | Sequence[str] | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJob:
        """Learn from examples (conversations, or pairs of prompt and completion), an uploaded data set,
        corrections by their ids, or all of these that no job has learned yet.
        """
        given = {"examples": examples, "dataset": dataset, "corrections": corrections}
        data = {name: value for name, value in given.items() if value is not None}
        return await self.submit("sft", {"adapter": adapter, **data, **options}, idempotency_key)

    async def opd(
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
    ) -> AsyncJob:
        """Learn from a teacher's judgement of what the student writes to `prompts` (or wrote in `groups`)."""
        body = {"adapter": adapter, "teacher": teacher, "divergence": divergence, **options}
        given = {"prompts": prompts, "groups": groups, "rollout": rollout}
        body |= {name: value for name, value in given.items() if value is not None}
        return await self.submit("opd", body, idempotency_key)

    async def submit(self, recipe: str, body: JsonObject, idempotency_key: str | None = None) -> AsyncJob:
        """POST /v1/train/{recipe} with any body. The same key and body never make a second job."""
        return AsyncJob(
            self._client, await self._client.send(calls.submit_job(recipe, body, idempotency_key))
        )

    async def job(self, job_id: str) -> AsyncJob:
        """A job by its id."""
        return AsyncJob(self._client, await self._client.send(calls.get_job(job_id)))

    async def jobs(self, limit: int = 100) -> list[AsyncJob]:
        """The newest first."""
        return [AsyncJob(self._client, state) for state in await self._client.send(calls.list_jobs(limit))]

    async def status(self) -> JsonObject:
        """The trainer: what it runs, how much waits, whose weights it maps."""
        return await self._client.send(calls.get("/v1/train/status"))


class AsyncJob:
    """A training job. `state` is what the server said last; `refresh` asks again."""

    def __init__(self, client: AsyncClient, state: JobState) -> None:
        self._client = client
        self.state = state

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r}, {self.status})"

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

    async def refresh(self) -> AsyncJob:
        self.state = await self._client.send(calls.get_job(self.id))
        return self

    async def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> AsyncJob:
        """Until it has ended and, having succeeded, its version answers. Times out within 15 s more.

        Raises:
            JobFailed, JobCancelled, GateNotPassed: it ended so.
            WaitTimedOut: it goes on after `timeout_s`.
        """
        line = ProgressLine(self.id) if progress else None
        async with contextlib.aclosing(self.events(timeout_s=timeout_s)) as events:
            async for event in events:
                if line is not None:
                    line.show(event)
        await self.refresh()
        check_outcome(self.state)
        return self

    async def events(
        self, *, timeout_s: float | None = None, patience_s: float = 60.0
    ) -> AsyncGenerator[JobEvent]:
        """What happened and happens, from the start until it has ended.

        A connection that breaks is taken up where it broke off, for up to `patience_s`.
        """
        cursor = EventCursor(self.id, patience_s=patience_s, timeout_s=timeout_s)
        while not cursor.has_ended:
            broke: KilnError | None = None
            try:
                async with contextlib.aclosing(self._events_once(cursor)) as events:
                    async for event in events:
                        yield event
            except KilnError as error:
                broke = error
            if not cursor.has_ended:
                await asyncio.sleep(cursor.broke_off(broke))

    async def _events_once(self, cursor: EventCursor) -> AsyncGenerator[JobEvent]:
        reader = SseReader()
        async with self._client.stream("GET", calls.job_events_path(self.id), **cursor.request()) as response:
            async for line in response.aiter_lines():
                raw = reader.feed(line)
                if raw is not None:
                    yield cursor.saw(raw)
                cursor.check_deadline()

    async def cancel(self, *, discard: bool = False) -> AsyncJob:
        """At once while it waits, at the next step boundary while it runs.

        With `discard`, versions that it published on its way are taken back.
        """
        self.state = await self._client.send(calls.cancel_job(self.id, discard))
        return self

    async def retry(self, *, idempotency_key: str | None = None, **changes: Any) -> AsyncJob:
        """A new job of the same data, with the settings in `changes`."""
        return AsyncJob(
            self._client, await self._client.send(calls.retry_job(self.id, changes, idempotency_key))
        )

    async def receipt(self) -> JsonObject:
        """All that is needed to run it again and compare."""
        return await self._client.send(calls.job_receipt(self.id))


class AsyncAdapters:
    """`client.adapters`: names, versions, and which one answers."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Adapter]:
        return await self._client.send(calls.list_adapters())

    async def get(self, name: str) -> Adapter:
        return await self._client.send(calls.get_adapter(name))

    async def attach(self, name: str, version: int | None = None) -> JsonObject:
        """Let a version (the latest unless one is named) answer for the base model's id."""
        return await self._client.send(calls.attach_adapter(name, version))

    async def detach(self) -> JsonObject:
        """Let the bare base model answer again."""
        return await self._client.send(calls.detach_adapter())

    async def rollback(self, name: str, version: int) -> JsonObject:
        """Let an older version be the name's latest again, from the next request on."""
        return await self._client.send(calls.roll_back_adapter(name, version))

    async def diff(
        self, name: str, from_version: int | None = None, to_version: int | None = None
    ) -> JsonObject:
        return await self._client.send(calls.diff_adapter(name, from_version, to_version))

    async def merge(
        self,
        sources: Mapping[str, float],
        output: str,
        *,
        mode: str = "linear",
        idempotency_key: str | None = None,
    ) -> JsonObject:
        """One new adapter out of several: {"name@version": weight}; mode is linear, ties or concat."""
        return await self._client.send(calls.merge_adapters(sources, output, mode, idempotency_key))

    async def delete(self, reference: str) -> JsonObject:
        """A name with all its versions, or "name@version". Raises ConflictError while it is attached."""
        return await self._client.send(calls.delete_adapter(reference))

    async def upload(
        self, name: str, source: str | Path, *, attach: bool = False, idempotency_key: str | None = None
    ) -> AdapterVersion:
        """Publish a PEFT folder, or an archive of one, as a new version of `name`."""
        files = calls.adapter_files(source)
        return await self._client.send(calls.upload_adapter(name, files, attach, idempotency_key))

    async def download(self, name: str, target: str | Path, version: int | None = None) -> Path:
        """Write a version's PEFT folder as tar.gz to the file `target`; whole, or not at all."""
        path = Path(target)
        partial = path.with_name(f"{path.name}.partial")
        params = {} if version is None else {"version": version}
        async with self._client.stream("GET", calls.download_path(name), params=params) as response:
            with partial.open("wb") as file:
                async for piece in response.aiter_bytes():
                    file.write(piece)
        return partial.rename(path)
