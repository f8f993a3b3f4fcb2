"""Draws trl_curves.csv: one panel a recipe, Kiln's losses over TRL's. Runs where matplotlib is.

python benchmarks/against_trl/plot.py trl_curves.csv trl_curves.svg
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib import pyplot

pyplot.switch_backend("svg")
pyplot.rcParams["svg.hashsalt"] = "kiln"  # the same figures give the same file


def main(csv_file: str, image_file: str) -> None:
    with Path(csv_file).open(newline="") as file:
        rows = list(csv.DictReader(file))
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    figure, panels = pyplot.subplots(1, len(recipes), figsize=(4 * len(recipes), 3), squeeze=False)
    for panel, recipe in zip(panels[0], recipes, strict=True):
        own = [row for row in rows if row["recipe"] == recipe]
        steps = [int(row["step"]) for row in own]
        panel.plot(steps, [float(row["trl_loss"]) for row in own], color="tab:orange", lw=4, label="TRL")
        panel.plot(steps, [float(row["kiln_loss"]) for row in own], color="tab:blue", lw=1, label="Kiln")
        panel.set(title=recipe, xlabel="step", ylabel="loss")
        panel.legend()
    figure.tight_layout()
    figure.savefig(image_file, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
