"""GET /v1/events and GET /: what the dashboard is made of."""

import asyncio
import json
from contextlib import aclosing, asynccontextmanager

import httpx
import pytest

from kiln_common.pb.common_pb2 import AdapterRef
from kiln_common.pb.trainer_pb2 import Job
from kiln_gateway.settings import ApiKey
from tests.support.gateway import gateway_rig, served

KEYS = (
    ApiKey(key="infer-key-0123456789", scopes=("infer",)),
    ApiKey(key="train-key-0123456789", scopes=("infer", "train")),
    ApiKey(key="admin-key-0123456789", scopes=("infer", "train", "admin")),
)
PLACE = {"address", "device_id"}  # of an engine, for admins
GRPO = {"adapter": "a", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}


@asynccontextmanager
async def watching(url, **headers):
    """The events of one stream as (name, body) pairs, from a real connection."""
    async with (
        httpx.AsyncClient(base_url=url, timeout=10, headers=headers) as http,
        http.stream("GET", "/v1/events") as response,
    ):
        assert response.status_code == 200
        async with aclosing(_events(response)) as events:
            yield events


async def _events(response):
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


async def until(events, wanted, condition=lambda body: True):
    async with asyncio.timeout(60):
        async for name, body in events:
            if name == wanted and condition(body):
                return body
    raise AssertionError(f"the stream ended before {wanted}")


async def condition(is_met):
    async with asyncio.timeout(60):
        while not is_met():
            await asyncio.sleep(0.01)


async def test_the_stream_begins_with_everything_and_goes_on_with_what_changed(tmp_path):
    async with gateway_rig(tmp_path) as rig, served(rig) as url:
        rig.registry.add("helpful")
        async with watching(url) as events:
            hello = await until(events, "hello")
            assert hello["scopes"] == ["admin", "infer", "train"]
            assert hello["model"] == "kiln/tiny"
            sample = await until(events, "sample")
            assert sample["engine"]["pages_in_use"] == 7
            assert sample["seconds"]["inter_token_p50"] is None
            status = await until(events, "status")
            assert status["engines"][0]["device"] == "cpu"
            assert status["training"]["gpu_sharing"] == "mps"
            (adapter,) = await until(events, "adapters")
            assert [version["id"] for version in adapter["versions"]] == ["helpful@1"]

            await rig.post("/v1/train/grpo", GRPO)
            (job,) = await until(events, "jobs")
            assert (job["status"], job["effective_config"]["adapter"]) == ("queued", "a")
            rig.registry.add("helpful")
            (adapter,) = await until(events, "adapters")
            assert adapter["latest_version"] == 2


async def test_a_request_is_shown_with_where_its_time_went(tmp_path):
    async with gateway_rig(tmp_path) as rig, served(rig) as url:
        rig.engine.pause_after = 3
        async with watching(url) as events:
            chat = asyncio.create_task(rig.chat(n=1))
            await rig.engine.paused.wait()
            body = await until(events, "requests", lambda body: bool(body["running"]))
            (running,) = body["running"]
            assert (running["end"], running["tokens"], running["adapter"]) == (None, 3, "base")
            await until(events, "sample")  # a second later
            rig.engine.go_on.set()
            answer = (await chat).json()
            body = await until(events, "requests", lambda body: bool(body["ended"]))
            sample = await until(events, "sample")
        (ended,) = body["ended"]
        assert body["running"] == []
        assert ended["id"] == answer["id"]
        assert ended["end"] == "stop"
        assert ended["tokens"] == answer["usage"]["completion_tokens"]
        assert ended["cached_tokens"] == answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert set(ended["seconds"]) == {"edge", "queue", "prefill", "decode"}
        assert min(ended["seconds"].values()) >= 0
        # The pause was between the third token and the fourth.
        assert ended["seconds"]["decode"] == max(ended["seconds"].values())
        assert 0 < sample["seconds"]["inter_token_p50"] <= sample["seconds"]["inter_token_p99"]
        assert sample["seconds"]["first_token_p50"] > 0


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_requests_that_do_not_finish_are_shown_as_such(tmp_path, end):
    async with gateway_rig(tmp_path) as rig, served(rig) as url:
        if end == "failed":
            rig.engine.fail_after = 2
            await rig.chat()
        else:
            rig.engine.pause_after = 2
            async with (
                httpx.AsyncClient(base_url=url, timeout=30) as http,
                http.stream(
                    "POST",
                    "/v1/chat/completions",
                    json={"messages": [{"role": "user", "content": "Hi"}], "stream": True},
                ),
            ):
                await rig.engine.paused.wait()
        live = rig.app.state.gateway.metrics.live
        await condition(lambda: live.view()["ended"])
        ((_, ended),) = live.view()["ended"]
        assert (ended["end"], ended["tokens"]) == (end, 2)


async def test_keys_see_what_their_scopes_allow(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "engine.log").write_text('{"event": "engine_ready"}\n')
    async with (
        gateway_rig(tmp_path, api_keys=KEYS, log_dir=str(tmp_path / "logs")) as rig,
        served(rig) as url,
    ):
        assert (await rig.http.get("/v1/events")).status_code == 401
        admin = {"Authorization": "Bearer admin-key-0123456789"}
        await rig.post("/v1/train/grpo", GRPO, headers=admin)
        async with watching(url, **admin) as events:
            assert (await until(events, "hello"))["has_logs"] is True
            assert len(await until(events, "jobs")) == 1
            (line,) = await until(events, "logs")
            assert (line["service"], line["event"]) == ("engine", "engine_ready")
            # The fake's adapters belong to no key: an admin sees them, others see their own.
            rig.registry.add("helpful")
            assert len(await until(events, "adapters", bool)) == 1
        train = {"Authorization": "Bearer train-key-0123456789"}
        await rig.post("/v1/train/grpo", {**GRPO, "adapter": "mine"}, headers=train)
        async with watching(url, **train) as events:
            (job,) = await until(events, "jobs")
            assert job["effective_config"]["adapter"] == "mine"
        seen = set()
        async with watching(url, Authorization="Bearer infer-key-0123456789") as events:
            hello = await until(events, "hello")
            assert (hello["scopes"], hello["has_logs"]) == (["infer"], False)
            async with asyncio.timeout(60):
                async for name, body in events:
                    if name == "sample" and name in seen:
                        break
                    seen.add(name)
                    assert name != "adapters" or body == []
        assert seen == {"sample", "requests", "status", "adapters"}


async def test_what_belongs_to_another_key_is_in_no_answer(tmp_path):
    """Requests with their adapters' names, resident adapters, and the job that runs."""
    async with gateway_rig(tmp_path, api_keys=KEYS) as rig, served(rig) as url:
        owner = KEYS[1].caller().owner
        rig.registry.add("mine", owner=owner)
        rig.registry.add("others", owner="somebody")
        rig.engine.residents = [AdapterRef(name=name, version=1) for name in ("mine", "others")]
        infer, train, admin = [{"Authorization": f"Bearer {key.key}"} for key in KEYS]
        await rig.post("/v1/train/grpo", GRPO, headers=train)
        rig.trainer.running_job_id = "job_1"
        chat = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}]}
        answer = (await rig.post("/v1/chat/completions", chat, headers=train)).json()

        both, none = ["mine@1", "others@1"], []
        for headers, residents, running, requests in (
            (admin, both, "job_1", [answer["id"]]),
            (train, both[:1], "job_1", [answer["id"]]),
            (infer, none, None, none),
        ):
            health = (await rig.http.get("/health", headers=headers)).json()
            assert health["engines"][0]["resident_adapters"] == residents
            assert PLACE & health["engines"][0].keys() == (PLACE if headers == admin else set())
            assert health["training"]["running_job_id"] == running
            stats = (await rig.http.get("/v1/stats", headers=headers)).json()
            assert stats["training"]["running_job_id"] == running
            async with watching(url, **headers) as events:
                shown = await until(events, "requests")
                assert [each["id"] for each in shown["ended"]] == requests
                status = await until(events, "status")
                assert status["engines"][0]["resident_adapters"] == residents
                assert PLACE & status["engines"][0].keys() == (PLACE if headers == admin else set())
                assert status["training"]["running_job_id"] == running
        rig.trainer.jobs["job_1"].owner = "somebody"
        for headers, running in ((admin, "job_1"), (train, None)):
            found = (await rig.http.get("/v1/train/status", headers=headers)).json()
            assert (found["running_job_id"], found["status"]) == (running, "running")


async def test_a_keys_own_jobs_are_shown_however_many_others_have(tmp_path):
    async with gateway_rig(tmp_path, api_keys=KEYS) as rig, served(rig) as url:
        train, admin = [{"Authorization": f"Bearer {key.key}"} for key in KEYS[1:]]
        await rig.post("/v1/train/grpo", GRPO, headers=train)
        rig.trainer.jobs["job_1"].status = "succeeded"
        for number in range(60):
            job = Job(id=f"of_another_{number}", owner="somebody", status="failed", created_at_s=200.0)
            rig.trainer.jobs[job.id] = job
        async with watching(url, **train) as events:
            (job,) = await until(events, "jobs")
            assert job["id"] == "job_1"
        async with watching(url, **admin) as events:
            assert len(await until(events, "jobs")) == 50


async def test_nothing_is_read_while_nobody_watches(tmp_path):
    async with gateway_rig(tmp_path) as rig, served(rig) as url:
        feed = rig.app.state.feed
        async with watching(url) as events:
            await until(events, "sample")
            assert feed.num_watchers == 1
        await condition(lambda: feed.is_idle)
        assert feed.num_watchers == 0
        async with watching(url) as events:
            # Those who come later are shown the past.
            assert len((await until(events, "hello"))["history"]) >= 1
            await until(events, "sample")


async def test_what_is_down_is_left_out_and_the_stream_goes_on(tmp_path):
    async with gateway_rig(tmp_path) as rig, served(rig) as url:
        rig.trainer.is_up = rig.engine.is_up = False
        async with watching(url) as events:
            status = await until(events, "status")
            assert (status["engines"][0]["status"], status["training"]) == ("unavailable", None)
            rig.trainer.is_up = rig.engine.is_up = True
            status = await until(events, "status", lambda body: body["training"] is not None)
            assert status["engines"][0]["status"] == "ok"


async def test_the_page_may_load_and_ask_its_own_server_only(tmp_path):
    async with gateway_rig(tmp_path, api_keys=KEYS) as rig:
        page = await rig.http.get("/")
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in page.text
        for name in ("app.js", "app.css", "icon.svg"):
            assert f"/dashboard/{name}" in page.text
            asset = await rig.http.get(f"/dashboard/{name}")
            assert asset.status_code == 200
            again = await rig.http.get(f"/dashboard/{name}", headers={"If-None-Match": asset.headers["ETag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert (await rig.http.get("/dashboard/__init__.py")).status_code == 404
