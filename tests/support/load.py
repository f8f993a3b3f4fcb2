"""Clients that ask all the time and never try again: every attempt is counted, with what came of it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.stack import wait_for
from tests.support.variants import patience


@dataclass(frozen=True)
class Attempt:
    began_s: float  # time.monotonic()
    ended_s: float
    outcome: str  # "ok", or what the client saw instead


class ChatLoad:
    """`num_clients` threads, half of them streaming, each on a new connection for each request.

    The questions come round again, each with a seed of its own: `texts` has all answers to each.
    """

    def __init__(
        self,
        url: str,
        num_clients: int = 4,
        *,
        max_tokens: int = 16,
        timeout_s: float = 60.0,
        socket_path: Path | None = None,  # instead of the URL's host
    ) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s * patience()
        self._socket_path = str(socket_path) if socket_path is not None else None
        self._stop = threading.Event()
        self.attempts: list[Attempt] = []
        self.texts: defaultdict[str, set[str]] = defaultdict(set)
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,), daemon=True)
            for number in range(num_clients)
        ]

    def __enter__(self) -> ChatLoad:
        for thread in self._threads:
            thread.start()
        self.wait_for_ok(2)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self._timeout_s + 10)
            assert not thread.is_alive(), "a request had no ending"

    def wait_for_ok(self, count: int = 1, timeout_s: float = 120.0) -> float:
        """Wait for `count` answers to requests that begin now; returns the seconds it took."""
        began_s = time.monotonic()
        wait_for(
            lambda: sum(a.outcome == "ok" and a.began_s >= began_s for a in list(self.attempts)) >= count,
            f"{count} answers; the last attempts: {self.attempts[-5:]}",
            timeout_s * patience(),
        )
        return time.monotonic() - began_s

    def outcomes(self) -> Counter[str]:
        return Counter(attempt.outcome for attempt in list(self.attempts))

    @property
    def longest_s(self) -> float:
        return max(attempt.ended_s - attempt.began_s for attempt in list(self.attempts))

    def _ask_on(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            began_s = time.monotonic()
            outcome = self._ask(f"What is {number} + {count % 3}?", is_streaming=number % 2 == 0)
            self.attempts.append(Attempt(began_s, time.monotonic(), outcome))
            count += 1
            if outcome != "ok":
                self._stop.wait(0.1)  # a refusal comes at once: do not drown what recovers

    def _ask(self, content: str, *, is_streaming: bool) -> str:
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "stream": is_streaming,
            "seed": sum(content.encode()),
        }
        try:
            transport = httpx.HTTPTransport(uds=self._socket_path)
            with (
                httpx.Client(transport=transport, timeout=self._timeout_s) as http,
                http.stream("POST", self._url, json=body) as response,
            ):
                text = response.read().decode()
        except httpx.HTTPError as error:
            return type(error).__name__
        if response.status_code != 200:
            return f"{response.status_code} {json.loads(text)['error']['code']}"
        if is_streaming:
            outcome, text = _read_stream(text)
        else:
            outcome, text = "ok", json.loads(text)["choices"][0]["message"]["content"]
        if outcome == "ok":
            self.texts[content].add(text)
        return outcome


def _read_stream(text: str) -> tuple[str, str]:
    """How a stream ended, and what it said."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        last = json.loads(events[-1]) if events else {}
        return (f"stream {last['error']['code']}" if "error" in last else "stream broken off"), ""
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "ok", "".join(choice["delta"].get("content") or "" for choice in choices)
