"""The ids of requests and traces, and what a log line says of a request."""

import structlog

from kiln_common import tracing
from tests.support.gateway import gateway_rig

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


async def error_of(rig, **headers):
    response = await rig.post("/v1/chat/completions", {}, headers=headers)
    body = response.json()["error"]
    assert body["request_id"] == response.headers["X-Request-Id"]
    return body["request_id"]


async def test_a_requests_id_is_its_traces(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        assert await error_of(rig, traceparent=TRACEPARENT) == f"req_{TRACE_ID}"
        made = await error_of(rig)
        assert made.startswith("req_")
        assert tracing.trace_id_of(f"00-{made.removeprefix('req_')}-00f067aa0ba902b7-01")
        for broken in ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", "ff" + TRACEPARENT[2:], "nonsense"):
            assert TRACE_ID not in await error_of(rig, traceparent=broken)
        given = await error_of(rig, traceparent=TRACEPARENT, **{"X-Request-Id": "mine-1"})
        assert given == "mine-1"


EXAMPLE = {"prompt": "a", "completion": "b"}


async def test_bodies_are_logged_only_where_that_was_asked_for(tmp_path):
    for log_bodies in (False, True):
        async with gateway_rig(tmp_path / str(log_bodies), log_bodies=log_bodies) as rig:
            processors = [structlog.contextvars.merge_contextvars]
            with structlog.testing.capture_logs(processors=processors) as lines:
                body = {"messages": [{"role": "user", "content": "zanzibar"}]}
                headers = {"traceparent": TRACEPARENT, "X-Request-Id": "mine-1"}
                await rig.post("/v1/chat/completions", body, headers=headers)
                hook = {"url": "http://localhost/", "secret": "a-secret-of-somebody"}
                await rig.post("/v1/train/sft", {"webhook": hook, "adapter": "a", "examples": [EXAMPLE]})
        assert "a-secret-of" not in repr(lines)
        assert ("zanzibar" in repr(lines)) is log_bodies
        found = [line for line in lines if line.get("path") == "/v1/chat/completions"]
        assert len([line for line in lines if line.get("path") == "/v1/train/sft"]) == log_bodies
        assert [(line["request_id"], line["trace_id"]) for line in found] == [
            ("mine-1", TRACE_ID)
        ] * log_bodies
