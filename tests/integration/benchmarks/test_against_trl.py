"""Training gives the losses that TRL gave on the same rows, in the same order, from the same adapter.

TRL's are those of benchmarks/results/trl_curves.csv, which `python -m benchmarks.against_trl curves` writes.
"""

import csv

import pytest

from benchmarks.against_trl import kiln_side
from benchmarks.against_trl.__main__ import curve_spec, distance, write_start
from benchmarks.engine.results import RESULTS


def trl_losses(recipe, num_steps):
    with (RESULTS / "trl_curves.csv").open(newline="") as file:
        return [float(row["trl_loss"]) for row in csv.DictReader(file) if row["recipe"] == recipe][:num_steps]


@pytest.mark.parametrize("recipe", ["sft", "grpo", "opd"])
def test_losses_are_those_of_trl(tmp_path, recipe):
    spec = curve_spec(recipe)
    spec |= {"epochs": spec["epochs"] // 3}
    write_start(spec, tmp_path, rank=8)
    losses = kiln_side.run(spec)["losses"]
    assert len(losses) == 16
    # float32 sums in another order, which AdamW's first steps magnify.
    assert distance(losses, trl_losses(recipe, len(losses))) < 1e-3
