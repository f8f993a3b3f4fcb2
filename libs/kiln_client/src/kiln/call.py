"""A request as a value, so that the two clients share everything but how they wait."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx

from kiln.errors import ConnectionFailed, error_of_answer, error_of_event

T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8420"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and what its answer means; `options` go to httpx as they are.

    `answers_with` are statuses of 400 or above whose body is an answer nevertheless.
    """

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    options: Mapping[str, Any] = field(default_factory=dict)
    answers_with: tuple[int, ...] = ()


@dataclass(frozen=True)
class Connection:
    """Where the server is and who asks. The environment fills in what is left out."""

    base_url: str
    api_key: str | None
    timeout_s: float

    @classmethod
    def of(cls, base_url: str | None, api_key: str | None, timeout_s: float) -> Connection:
        url = (base_url or os.environ.get("KILN_URL") or DEFAULT_URL).rstrip("/")
        # OpenAI's base URL is the same server; take it as that.
        return cls(url.removesuffix("/v1"), api_key or os.environ.get("KILN_API_KEY"), timeout_s)

    def http_options(self) -> dict[str, Any]:
        """Keyword arguments of httpx.Client and httpx.AsyncClient."""
        is_loopback = urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        return {
            "base_url": self.base_url,
            "headers": {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            # Connecting takes seconds at most, an answer as long as it is.
            "timeout": httpx.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s)),
            # A proxy of the environment does not reach this machine's own loopback.
            "trust_env": not is_loopback,
        }

    def openai_options(self) -> dict[str, Any]:
        """Keyword arguments of openai.OpenAI and openai.AsyncOpenAI."""
        return {"base_url": f"{self.base_url}/v1", "api_key": self.api_key or "unused"}


def as_json(response: httpx.Response) -> dict[str, Any]:
    return response.json()


def as_data(response: httpx.Response) -> list[dict[str, Any]]:
    """The entries of a list object."""
    return response.json()["data"]


def raise_for_status(response: httpx.Response) -> None:
    """The answer has been read. Raises the ApiError of its status."""
    if response.status_code >= 400:
        raise error_of_answer(response.status_code, response.content, response.headers)


class SseReader:
    """Server-sent events out of lines: `feed` returns the event that a line completes."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> dict[str, Any] | None:
        """An event's JSON object; None while there is none, and for the `[DONE]` mark.

        Raises:
            ApiError: the stream says that it failed.
        """
        if line.startswith("data:"):
            self._data.append(line[5:].strip())
            return None
        if line or not self._data:
            return None
        text, self._data = "\n".join(self._data), []
        if text == "[DONE]":
            return None
        event = json.loads(text)
        # A job's `failed` event has an error of its own; a stream's has nothing else.
        if set(event) == {"error"} and isinstance(event["error"], dict):
            raise error_of_event(event["error"])
        return event


@contextlib.contextmanager
def connecting(base_url: str) -> Iterator[None]:
    """Whatever the network does wrong becomes ConnectionFailed."""
    try:
        yield
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ConnectionFailed(f"{base_url} does not answer: {reason}") from error
