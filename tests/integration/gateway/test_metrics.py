"""GET /metrics, and the page, dashboard and rules that name its metrics."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kiln_common.errors import EngineUnavailable
from kiln_common.histogram import Histogram
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_gateway.engine_seat import EngineSeat
from kiln_gateway.routes.health import engine_totals
from tests.support.gateway import gateway_rig

REPOSITORY = Path(__file__).resolve().parents[3]
MONITORING = REPOSITORY / "deploy" / "monitoring"
IN_TEXT = re.compile(r"\bkiln_(?:gateway|engine|trainer)_[a-z_]+\b")
SUFFIXES = ("_bucket", "_sum", "_count")


def engine_stats():
    step_seconds = Histogram((0.01, 0.1))
    for seconds in (0.005, 0.005, 0.05, 7.0):
        step_seconds.observe(seconds)
    return engine_pb2.EngineStats(
        num_running=3, num_waiting=2, num_pages=100, num_pages_in_use=60, num_pages_cached=20,
        num_adapter_slots=4, resident_adapters=[engine_pb2.ResidentAdapter(num_pins=1)],
        step_seconds=step_seconds.to_proto(), num_device_bytes=1000, num_device_bytes_free=400,
        memory_parts=[
            engine_pb2.MemoryPart(name=name, num_bytes=num_bytes)
            for name, num_bytes in (("weights", 500), ("kv", 40), ("states", 30), ("adapters", 20), ("workspace", 10))
        ],
        drafts=[
            engine_pb2.DraftTotals(num_proposed=9, num_accepted=5),
            engine_pb2.DraftTotals(adapter="billing", num_proposed=4, num_accepted=4),
        ],
    )  # fmt: skip


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:

        async def get_stats():
            if not rig.engine.is_up:
                raise EngineUnavailable("the engine is down")
            return engine_stats()

        async def status():
            return trainer_pb2.TrainerStatus(
                num_queued=1, num_jobs_ended={"succeeded": 2}, metrics={"loss": 0.5}
            )

        rig.engine.get_stats = get_stats
        rig.trainer.status = status
        yield rig


async def scrape(rig):
    """{name with its suffix: {labels: value}}."""
    found = {}
    text = (await rig.http.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_what_engine_and_trainer_said_is_shown(rig):
    found = await scrape(rig)
    engine, trainer = ("engine", "engine"), ("trainer", "trainer")
    assert found["kiln_engine_up"][(engine,)] == 1
    assert found["kiln_engine_requests_waiting"][(engine,)] == 2
    assert found["kiln_engine_kv_cache_usage_ratio"][(engine,)] == 0.4
    assert found["kiln_engine_kv_pages"] == {
        (engine, ("holder", holder)): count for holder, count in (("sequences", 40), ("cache", 20), ("free", 40))
    }  # fmt: skip
    assert found["kiln_engine_adapter_slots"][engine, ("use", "pinned")] == 1
    assert found["kiln_engine_device_memory_bytes"][engine, ("state", "used")] == 600
    assert found["kiln_engine_memory_bytes"][engine, ("part", "weights")] == 500
    assert found["kiln_engine_spec_decode_draft_tokens_total"][("adapter", "(base)"), engine] == 9
    assert found["kiln_engine_spec_decode_accepted_tokens_total"][("adapter", "billing"), engine] == 4
    buckets = found["kiln_engine_step_seconds_bucket"]
    assert [buckets[engine, ("le", bound)] for bound in ("0.01", "0.1", "+Inf")] == [2, 3, 4]
    assert found["kiln_engine_step_seconds_sum"][(engine,)] == pytest.approx(7.06)
    assert found["kiln_trainer_jobs_ended_total"][("status", "succeeded"), trainer] == 2
    assert found["kiln_trainer_step_metric"][("name", "loss"), trainer] == 0.5


async def test_health_says_what_holds_an_engines_memory(rig):
    (engine,) = (await rig.http.get("/health")).json()["engines"]
    assert engine["memory"] == {
        "weights_bytes": 500, "kv_bytes": 40, "state_bytes": 30, "adapter_bytes": 20, "workspace_bytes": 10,
        "device_bytes": 1000,
    }  # fmt: skip


@pytest.mark.parametrize(("device_ids", "num_devices"), [(("d", "d"), 1), (("d", "e"), 2), (("", ""), 2)])
def test_a_devices_memory_is_counted_once_and_what_engines_hold_is_added_up(device_ids, num_devices):
    found = [
        (EngineSeat(number, client=None, info=engine_pb2.EngineInfo(device_id=device_id)), engine_stats())
        for number, device_id in enumerate(device_ids)
    ]
    silent = EngineSeat(2, client=None, info=engine_pb2.EngineInfo(device_id="d"))
    total = engine_totals([(silent, None), *found])
    assert total["device_bytes"] == 1000 * num_devices
    assert total["device_bytes_free"] == 400 * num_devices
    assert total["pages_total"] == 200


async def test_a_draining_engine_is_called_so(rig):
    async def get_stats():
        return engine_pb2.EngineStats(is_draining=True)

    rig.engine.get_stats = get_stats
    (engine,) = (await rig.http.get("/health")).json()["engines"]
    assert (engine["id"], engine["address"], engine["status"]) == ("engine", "fake:1", "draining")


async def test_a_service_that_is_away_is_down_and_tells_nothing(rig):
    rig.engine.is_up = False
    found = await scrape(rig)
    assert found["kiln_engine_up"][("engine", "engine"),] == 0
    assert "kiln_engine_requests_running" not in found


async def test_a_completion_counts_its_times(rig):
    rig.engine.script = lambda request: "Hello there, thank you"
    tokens = (await rig.chat()).json()["usage"]["completion_tokens"]
    found = await scrape(rig)
    count = {
        name: found[f"kiln_gateway_{name}_seconds_count"][()]
        for name in ("time_to_first_token", "inter_token_latency", "queue_time", "choice")
    }
    assert tokens > 2
    assert count == {
        "time_to_first_token": 1, "inter_token_latency": tokens - 1, "queue_time": 1, "choice": 1
    }  # fmt: skip
    assert found["kiln_gateway_completion_tokens_total"][()] == tokens


async def test_the_page_names_every_metric_and_no_other(rig):
    await rig.chat()
    shown = {name for name in await scrape(rig) if not name.endswith(("_created", "_bucket", "_sum"))}
    shown = {name.removesuffix("_count") for name in shown}
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(kiln_\w+)` \|", page, re.MULTILINE))
    # A rig without Redis keeps no rollouts; one with a single engine moves no request.
    assert documented - shown <= {"kiln_gateway_rollouts_total", "kiln_gateway_requests_moved_total"}
    assert shown <= documented


@pytest.mark.parametrize("name", ["alerts.yml", "grafana-dashboard.json"])
def test_dashboard_and_rules_name_metrics_that_exist(name):
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(kiln_\w+)` \| (\w+)", page, re.MULTILINE))
    known = {metric for metric, kind in documented if kind != "histogram"}
    known |= {metric + suffix for metric, kind in documented if kind == "histogram" for suffix in SUFFIXES}
    text = (MONITORING / name).read_text(encoding="utf-8")
    used = set(IN_TEXT.findall(text))
    assert len(used) > 5
    assert used <= known


def test_dashboard_and_rules_are_whole():
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text(encoding="utf-8"))
    assert len({panel["title"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    rules = [
        rule
        for group in yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]
    operations = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    for rule in rules:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule)
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert f"`{rule['alert']}`" in operations, "every alert says what to do"
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    assert scraped["rule_files"] == ["alerts.yml"]
