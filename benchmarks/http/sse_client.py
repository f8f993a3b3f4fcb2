"""A lean HTTP/1.1 client for streamed answers: it notes when each event came and decodes it later.

Nothing but the standard library, so that the load comes from any machine, and little work for each
event, so that the client is not what is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

_READ_BYTES = 1 << 18
_HEAD_END = b"\r\n\r\n"


class BadResponse(Exception):
    """What came back is not an HTTP/1.1 response with an event stream."""


@dataclass
class Answer:
    """What one request saw; times are seconds of one clock that processes share."""

    start_s: float
    end_s: float = 0.0
    # (arrival, payload) of each event, as it came.
    events: list[tuple[float, bytes]] = field(default_factory=list)
    is_done: bool = False  # the stream ended with [DONE]
    error: str = ""


class ChunkedBody:
    """Takes a body apart that was sent with `Transfer-Encoding: chunked`."""

    def __init__(self) -> None:
        self.is_complete = False
        self._pending = b""
        # Bytes of the current chunk still to come, its line end included; 0 between chunks.
        self._num_left = 0

    def feed(self, data: bytes) -> bytes:
        """The body's bytes among `data`, which may begin and end anywhere."""
        self._pending += data
        parts = []
        while self._pending and not self.is_complete:
            if self._num_left:
                taken, self._pending = self._pending[: self._num_left], self._pending[self._num_left :]
                # The last two bytes of a chunk are its line end.
                num_payload = max(0, min(len(taken), self._num_left - 2))
                parts.append(taken[:num_payload])
                self._num_left -= len(taken)
                continue
            line, separator, rest = self._pending.partition(b"\r\n")
            if not separator:
                break
            size = int(line.split(b";")[0], 16)
            self._pending = rest
            self.is_complete = size == 0
            self._num_left = size + 2 if size else 0
        return b"".join(parts)


class EventLines:
    """Cuts a stream of server-sent events into the payloads of its data lines."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._tail = (self._tail + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Client:
    """Sends one request after the other over one connection, opened again when it breaks."""

    def __init__(self, base_url: str, headers: Sequence[tuple[str, str]], timeout_s: float) -> None:
        self._url: SplitResult = urlsplit(base_url)
        path = self._url.path.rstrip("/") + "/completions"
        lines = [f"POST {path} HTTP/1.1", f"Host: {self._url.netloc}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in headers]
        self._head = "\r\n".join(lines)
        self._timeout_s = timeout_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, body: bytes) -> Answer:
        """One request; what went wrong is in the answer's `error`."""
        answer = Answer(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(body, answer)
            if not answer.is_done and not answer.error:
                answer.error = "stream ended without [DONE]"
        except TimeoutError:
            answer.error = "timeout"
        except (OSError, asyncio.IncompleteReadError, ValueError, BadResponse) as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            answer.end_s = time.perf_counter()
            if answer.error:
                self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _exchange(self, body: bytes, answer: Answer) -> None:
        if self._streams is None:
            is_tls = self._url.scheme == "https"
            port = self._url.port or (443 if is_tls else 80)
            self._streams = await asyncio.open_connection(
                self._url.hostname, port, ssl=is_tls or None, limit=_READ_BYTES
            )
        reader, writer = self._streams
        writer.write(f"{self._head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        head = (await reader.readuntil(_HEAD_END)).decode("latin-1").split("\r\n")
        status = int(head[0].split()[1])
        fields = dict(_field(line) for line in head[1:] if ":" in line)
        if status != 200:
            text = await reader.read(2000) if "content-length" not in fields else b""
            if "content-length" in fields:
                text = await reader.readexactly(int(fields["content-length"]))
            answer.error = f"HTTP {status}: {text[:200].decode(errors='replace')}"
            return
        if fields.get("transfer-encoding", "").lower() != "chunked":
            raise BadResponse("the answer is not streamed in chunks")
        await _read_events(reader, answer)
        if fields.get("connection", "").lower() == "close":
            self.close()


async def _read_events(reader: asyncio.StreamReader, answer: Answer) -> None:
    body, lines = ChunkedBody(), EventLines()
    while not body.is_complete:
        data = await reader.read(_READ_BYTES)
        if not data:
            raise BadResponse("the connection ended within the answer")
        now = time.perf_counter()
        for payload in lines.feed(body.feed(data)):
            if payload == b"[DONE]":
                answer.is_done = True
            else:
                answer.events.append((now, payload))


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip().lower(), value.strip()


async def run_clients(clients: Sequence[Client], bodies: Iterable[bytes]) -> list[Answer]:
    """Send all bodies, each client its next one as soon as its last has ended; in order of ends."""
    queue = iter(bodies)  # one for all clients
    answers: list[Answer] = []

    async def work(client: Client) -> None:
        for body in queue:
            answers.append(await client.send(body))
        client.close()

    await asyncio.gather(*(work(client) for client in clients))
    return answers
