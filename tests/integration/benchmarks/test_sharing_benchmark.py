"""Serving while training, measured on a tiny model: the real backend in a process beside the spine."""

from __future__ import annotations

import csv

import pytest

from benchmarks.engine.spine import Spine, make_settings
from benchmarks.sharing import serving
from benchmarks.sharing.__main__ import environment
from benchmarks.sharing.serving import TINY, measure, ways
from benchmarks.sharing.training import sft_job
from kiln_cli.up import mps
from tests.support.tiny_models import make_checkpoint


def test_every_way_of_sharing_gets_a_row_with_both_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_BENCH_RESULTS", str(tmp_path))
    # Until training has done enough for a rate, which on a busy machine takes longer than a row.
    monkeypatch.setattr(serving, "_MOST_STRETCH", 100)
    monkeypatch.setattr(serving, "_IDLE_S", 0.2)
    make_checkpoint(tmp_path / "model", num_mtp_layers=0)
    with Spine(make_settings(tmp_path / "model", device="cpu", max_running=2)) as spine:
        assert measure(spine, TINY, "time_slices", row_seconds=0.5) == []
    with (tmp_path / "sharing.csv").open(newline="") as file:
        rows = {row["settings"]: row for row in csv.DictReader(file)}
    alone = rows.pop("time_slices, no training")
    assert alone["train_tok_per_s"] == ""
    assert list(rows) == [f"time_slices, {way.name}" for way in ways("time_slices", 132)]
    for row in (alone, *rows.values()):
        assert float(row["p99_ms"]) >= float(row["p50_ms"]) > 0
    assert all(float(row["train_tok_per_s"]) > 0 for row in rows.values())
    assert "gpu_share 0.5" in rows["time_slices, half of the time"]["note"]


def test_partitions_are_the_ones_of_the_table():
    shares = [way.shares["light"] * 132 for way in ways("mps", 132) if way.shares]
    assert shares == pytest.approx([32, 64, 96])


def test_one_step_of_the_job_is_one_micro_batch():
    request = sft_job(num_documents=2, document_tokens=16, vocab_size=50)
    assert request.config.batch_tokens == 32
    assert len(request.sft.examples) == 2


def test_processes_without_mps_are_no_clients_of_another_server(monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    with environment("time_slices") as env:
        assert env["CUDA_MPS_PIPE_DIRECTORY"] != "/tmp/nvidia-mps"


def test_mps_is_stopped_however_the_measurement_ends(monkeypatch):
    calls = []
    monkeypatch.setattr(mps.MpsServer, "start", lambda self: calls.append("start"))
    monkeypatch.setattr(mps.MpsServer, "stop", lambda self: calls.append("stop"))

    def fail():
        with environment("mps") as env:
            assert env["CUDA_MPS_PIPE_DIRECTORY"].endswith("pipe")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert calls == ["start", "stop"]
