"""A gateway before a paced engine under load, as `gateway_cost` measures it, small."""

from __future__ import annotations

import csv
import sys

import pytest

from benchmarks.http import edge_parts, gateway_cost


@pytest.mark.processes
def test_a_gateways_cost_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_BENCH_RESULTS", str(tmp_path))
    sizes = ["--clients", "3", "--requests", "6", "--prompt-tokens", "20", "--max-tokens", "40"]
    monkeypatch.setattr(sys, "argv", ["gateway_cost", *sizes, "--processes", "2"])
    gateway_cost.main()
    with (tmp_path / "http.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    # A step takes 2.4 ms and more, and each request draws a token of each.
    assert 0 < float(row["tok_per_s"]) < 3 / 0.0024
    assert 0 < float(row["note"].split("gateway ")[1].split(" us")[0]) < 20_000


def test_the_parts_of_the_edge_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_BENCH_RESULTS", str(tmp_path))
    monkeypatch.setattr(edge_parts, "_NUM_TOKENS", 100)
    edge_parts.main()
    with (tmp_path / "http.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["num_samples"] for row in rows] == ["5", "5", "100"]
    times = [float(part.split(" us")[0].split()[-1]) for row in rows for part in row["note"].split("; ")]
    # Some are differences of two measurements, which noise may turn round.
    assert len(times) >= len(rows)
    assert max(times) > 0
