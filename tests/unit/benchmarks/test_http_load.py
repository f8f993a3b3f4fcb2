"""The load generator: bodies in pieces, events to figures, and a whole run against a server."""

import asyncio
import json
import threading

import pytest

from benchmarks.http import openai_load
from benchmarks.http.load_report import decode, report
from benchmarks.http.sse_client import Answer, ChunkedBody, EventLines

STREAM = b'data: {"a": 1}\n\n: comment\n\ndata: [DONE]\n\n'


def chunked(parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_body_comes_out_however_it_is_cut(size):
    wire = chunked([STREAM[:5], STREAM[5:20], STREAM[20:]])
    body, lines, payloads = ChunkedBody(), EventLines(), []
    for start in range(0, len(wire), size):
        payloads += lines.feed(body.feed(wire[start : start + size]))
    assert payloads == [b'{"a": 1}', b"[DONE]"]
    assert body.is_complete


def answer(*events, start_s=0.0, error=""):
    stored = [(1.0 + index, json.dumps(event).encode()) for index, event in enumerate(events)]
    return Answer(start_s, 10.0, stored, True, error)


def token(text, finish=None):
    return {"choices": [{"text": text, "finish_reason": finish}]}


def test_tokens_are_counted_from_usage_and_a_bare_end_is_no_token():
    usage = {"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 7}}
    outcome = decode(answer(token("x"), token("y"), token("", "length"), usage))
    assert (outcome.num_output_tokens, outcome.num_prompt_tokens) == (2, 7)
    assert outcome.token_times_s == (1.0, 2.0)
    without = decode(answer(token("x"), token("y"), token("", "length")))
    assert without.num_output_tokens == 2


def test_what_went_wrong_is_counted():
    outcomes = [
        decode(answer(token("x"), {"error": {"message": "no"}})),
        decode(answer()),
        decode(Answer(0.0, 1.0, [(0.5, b"nonsense")], True)),
        decode(answer(token("x", "length"))),
    ]
    figures = report(outcomes, prompt_tokens=3, max_tokens=2, cpu_s=1.0)
    assert (figures["completed"], figures["failed"], figures["short_outputs"]) == (1, 3, 1)
    assert sum(figures["errors"].values()) == 3
    assert figures["ttft_s"]["p50"] == 1.0


class TokenServer:
    """Answers every completion with `max_tokens` events, in chunks, on one keep-alive connection."""

    def __init__(self):
        self.prompts = []
        self.num_connections = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        started = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        self.port = started.result(10).sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        self.num_connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            body = json.loads(await reader.readexactly(length))
            self.prompts.append(body["prompt"])
            if body["model"] == "bad":
                text = b'{"error": "no such model"}'
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
                continue
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            events = [token("w") for _ in range(body["max_tokens"])]
            parts = [b"data: %s\n\n" % json.dumps(event).encode() for event in events]
            writer.write(chunked([*parts, b"data: [DONE]\n\n"]))
            await writer.drain()


@pytest.fixture(scope="module")
def server():
    return TokenServer()


def load_options(server, *options):
    base_url = f"http://127.0.0.1:{server.port}/v1"
    fixed = ["--base-url", base_url, "--requests", "6", "--prompt-tokens", "5", "--max-tokens", "4"]
    return openai_load.parse_options([*fixed, "--concurrency", "2", *options])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_whole_run(server, num_processes):
    figures = openai_load.measure(load_options(server, "--model", "m", "--processes", str(num_processes)))
    assert (figures["completed"], figures["failed"], figures["output_tokens"]) == (6, 0, 24)
    assert figures["tokens_per_event"] == 1
    assert figures["output_tok_s"] > 0


def test_connections_are_kept(server):
    before = server.num_connections
    openai_load.measure(load_options(server, "--model", "m"))
    assert server.num_connections == before + 2


def test_prompts_share_what_was_asked_for_and_repeat_with_the_seed(server):
    options = load_options(server, "--model", "m", "--shared-prefix-tokens", "3")
    bodies = [json.loads(body)["prompt"] for body in openai_load.make_bodies(options, 3, "0/run")]
    assert len({tuple(prompt[:3]) for prompt in bodies}) == 1
    assert len({tuple(prompt) for prompt in bodies}) == 3
    assert bodies == [json.loads(body)["prompt"] for body in openai_load.make_bodies(options, 3, "0/run")]


def test_an_error_status_fails_the_request(server):
    figures = openai_load.measure(load_options(server, "--model", "bad"))
    assert figures["failed"] == 6
    assert "HTTP 404" in next(iter(figures["errors"]))
