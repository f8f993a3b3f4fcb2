"""Every part of the engine benchmarks, and both halves of the correctness twins, on a tiny model."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.engine.__main__ import model_costs
from benchmarks.engine.floor import Yardsticks
from benchmarks.engine.parts import PARTS, Bench
from benchmarks.engine.results import ResultFile
from benchmarks.engine.spine import Spine, UnknownSetting, make_settings
from benchmarks.engine.start import READY, start_once, timeline_of
from benchmarks.engine.workloads import TINY
from scripts.gpu.twins import compare, shortfalls
from scripts.gpu.twins_engine import TINY as TINY_TWIN
from scripts.gpu.twins_engine import Twin
from scripts.gpu.twins_reference import load_reference, score
from tests.support.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, num_mtp_layers=0)
    return path


@pytest.fixture
def spine(folder):
    with Spine(make_settings(folder, device="cpu", max_running=8)) as spine:
        yield spine


def test_every_part_adds_rows(spine, tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_BENCH_RESULTS", str(tmp_path))
    bench = Bench(spine, TINY, model_costs(spine), Yardsticks(1e11, 1e11), ResultFile("engine", "cpu"), "")
    for part in PARTS.values():
        part(bench)
    with (tmp_path / "engine.csv").open(newline="") as file:
        rows = {row["workload"]: row for row in csv.DictReader(file)}
    step = rows["decode step, batch 2, context 64"]
    assert float(step["mean_ms"]) > 0
    assert 60 < float(step["note"].split()[-1]) < 70  # the context it was asked for
    assert float(step["tok_per_s"]) == pytest.approx(2000 / float(step["mean_ms"]), rel=0.01)
    assert "48 tokens cached" in rows["prefix 48 + 8, second request"]["note"]
    assert (
        "of the rate with none resident" in rows["adapters: batch 3, context 64, 2 of rank 4 mixed"]["note"]
    )
    assert float(rows["idle engine"]["note"].split(" %")[0]) < 50


def test_an_unknown_setting_is_named(folder):
    with pytest.raises(UnknownSetting, match="no_such_setting"):
        make_settings(folder, no_such_setting="1")


def test_the_start_is_cut_at_its_log_lines(folder):
    timeline = dict(timeline_of(start_once(folder, {"KILN_ENGINE_DEVICE": "cpu"})))
    assert list(timeline)[-1] == READY
    assert timeline["loading_weights"] > 0


def test_the_twins_agree_and_notice_spoilt_checkpoints(spine, folder):
    twin = Twin(spine, TINY_TWIN, "tiny")
    twin.score_batch()
    twin.compare_alone()
    twin.spoil_checkpoints()
    twin.run_long()
    report = json.loads(json.dumps(asdict(twin.report)))
    started_from_cache = {t["group"] for t in report["traces"] if t["num_cached_tokens"]}
    assert {"intact", "wiped", "swapped"} <= started_from_cache
    scores = score(load_reference(folder, torch.float32, "cpu"), report["traces"], "cpu")
    scored = {"reports": [report], "scores": {"float32": scores, "bfloat16": scores}}
    ((_, figures, facts),) = compare(scored)
    # Float32 sums in another order; the reference stands in for its own bfloat16 here.
    assert figures["mean_abs_error"] < 1e-5
    assert figures["wiped_mean_abs_error"] > 0.1
    assert not shortfalls(figures, facts)
    assert facts["alone_identical_share"] == 1
    assert facts["is_batch_invariant"] is False
