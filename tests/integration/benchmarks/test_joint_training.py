"""Several jobs' adapters in one pass get the gradients that they get one after the other."""

import csv

import torch

from benchmarks.engine.results import ResultFile
from benchmarks.joint_training import COLUMNS, Jobs, measure
from benchmarks.training import Workload, tiny_shape
from kiln_nn.config import ModelConfig


def test_a_row_is_added_once_both_ways_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_BENCH_RESULTS", str(tmp_path))
    config = ModelConfig.from_dict({**tiny_shape(), "eos_token_id": 0})
    jobs = Jobs(config, torch.device("cpu"), 2, Workload(3, 2, 9))
    measure(jobs, 33, 1, ResultFile("joint_training", "cpu", COLUMNS))
    with (tmp_path / "joint_training.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["apart_ms"]) > 0
    assert float(row["note"].split()[-1]) < 1e-5
