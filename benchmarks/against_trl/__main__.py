"""The same runs through Kiln's trainer and through TRL: losses laid over each other, seconds side by side.

    python -m benchmarks.against_trl curves [--recipes sft grpo opd]
    python -m benchmarks.against_trl speed --model /tmp/random-4b [--workloads NAME …]

`curves` trains the demo model on a CPU in float32, writes every step to results/trl_curves.csv and draws
results/trl_curves.svg; it fails where the curves part. `speed` times steps on a GPU, one after the other
in processes of their own, same rows, rank, targets, formats and optimiser, and writes results/trl.csv.
TRL lives in an environment of its own: scripts/install_client.sh trl, or any Python that --trl-python
names, with --trl-path for packages beside it. Its DeltaNet layers are transformers' reference in torch
(flash-linear-attention refuses to run on this stack), so a ratio compares against that.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.against_trl import kiln_sampled, kiln_side
from benchmarks.against_trl.kiln_side import Spec
from benchmarks.engine.results import RESULTS, ResultFile, device_name
from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, write_adapter
from kiln_nn.lora.parameters import LoraParameters

_HERE = Path(__file__).resolve().parent
_REPOSITORY = _HERE.parents[1]
DEMO_MODEL = _REPOSITORY / "demo" / "model"
_TRL_PYTHON = _REPOSITORY / ".venv-clients" / "trl" / "bin" / "python"
_COLUMNS = (
    *("commit", "gpu", "torch", "triton", "workload", "settings", "kiln_ms", "trl_ms", "ratio"),
    *("kiln_tok_per_s", "trl_tok_per_s", "kiln_peak_gib", "trl_peak_gib", "num_samples", "note"),
)
# Of a curve's range: float32 sums in another order, which AdamW's first steps magnify.
_MOST_APART = 1e-3


@dataclass(frozen=True)
class Workload:
    """Rows of random tokens, `num_steps` steps of them."""

    recipe: str
    rows_per_step: int
    prompt_tokens: int
    completion_tokens: int
    micro_rows: int  # of TRL; Kiln packs a step's rows into one micro-batch
    is_sampled: bool = False
    num_steps: int = 8

    @property
    def num_tokens(self) -> int:
        return self.rows_per_step * (self.prompt_tokens + self.completion_tokens)


# For the 4B shape, but for distillation, which TRL was measured with at 0.6 B parameters: use 0.8b.
WORKLOADS = {
    "SFT 4 x 2048": Workload("sft", 4, 1, 2047, micro_rows=2),
    "GRPO 16 x (512 + 1024)": Workload("grpo", 16, 512, 1024, micro_rows=2),
    "OPD 8 x (64 + 128), given": Workload("opd", 8, 64, 128, micro_rows=8),
    # Kiln's engine draws the completions, TRL's trainer does it itself.
    "OPD 8 x (64 + 128), sampled": Workload("opd", 8, 64, 128, micro_rows=8, is_sampled=True),
}


def random_rows(workload: Workload, vocab_size: int) -> list[Spec]:
    """In GRPO one step's rows, which every step learns from again."""
    source = random.Random(0)
    num_steps = 1 if workload.recipe == "grpo" else workload.num_steps
    return [
        {
            "prompt": source.choices(range(vocab_size), k=workload.prompt_tokens),
            "completion": source.choices(range(vocab_size), k=workload.completion_tokens),
            "reward": float(number % 2),
        }
        for number in range(num_steps * workload.rows_per_step)
    ]


def text_rows(num_rows: int, num_tokens: int) -> list[Spec]:
    """Sums in words, cut into rows of one length whose prompts are of several."""
    source, tokenizer = random.Random(0), Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    pairs = ((source.randrange(50), source.randrange(50)) for _ in range(num_rows * num_tokens))
    text = " ".join(f"What is {a} + {b}? The answer to that is {a + b}, I believe." for a, b in pairs)
    ids = tokenizer.encode(text).ids
    rows = []
    for number in range(num_rows):
        row = ids[number * num_tokens : (number + 1) * num_tokens]
        num_prompt = source.randrange(4, num_tokens // 2)
        # What the reward is for does not matter here; that it is the same does.
        reward = 10 * sum(token % 2 for token in row[num_prompt:]) / (num_tokens - num_prompt)
        rows.append({"prompt": row[:num_prompt], "completion": row[num_prompt:], "reward": reward})
    return rows


def curve_spec(recipe: str) -> Spec:
    """A run of 48 steps on the demo model; GRPO's learn from 16 rollouts again and again, against clipping."""
    is_grpo = recipe == "grpo"
    return {
        "recipe": recipe,
        "model": str(DEMO_MODEL),
        "rows": text_rows(16 if is_grpo else 64, 48),
        "rows_per_step": 16 if is_grpo else 4,
        "micro_rows": 16 if is_grpo else 4,
        "group_rows": 4,
        "epochs": 48 if is_grpo else 3,
        "learning_rate": 5e-4,
        "dtype": "float32",
        "is_sampled": False,
        "gradient_checkpointing": False,
        "num_threads": 1,
        "seed": 1,
    }


def speed_spec(workload: Workload, model: Path) -> Spec:
    config = ModelConfig.from_folder(model)
    is_gpu = torch.cuda.is_available()
    return {
        "recipe": workload.recipe,
        "model": str(model),
        "rows": random_rows(workload, config.vocab_size),
        "rows_per_step": workload.rows_per_step,
        "micro_rows": workload.micro_rows,
        "group_rows": workload.rows_per_step // 2,
        "epochs": workload.num_steps if workload.recipe == "grpo" else 1,
        "learning_rate": 1e-4,
        "dtype": "bfloat16" if is_gpu else "float32",
        "is_sampled": workload.is_sampled,
        "gradient_checkpointing": is_gpu,
        "num_threads": 1,
        "seed": 1,
    }


def write_start(spec: Spec, folder: Path, rank: int) -> None:
    """The adapter that both start from. A student that is to be taught must differ from the base model."""
    config = ModelConfig.from_folder(Path(spec["model"]))
    lora = LoraParameters.create(config, LoraSpec(rank, 2.0 * rank), seed=0)
    generator = torch.Generator().manual_seed(1)
    size = 0.01 if spec["recipe"] == "opd" else 0.0
    tensors = {
        path: (a, size * torch.randn(b.shape, generator=generator)) for path, (a, b) in lora.tensors().items()
    }
    write_adapter(folder, tensors, lora.spec, "compared")
    spec["adapter"] = str(folder)


def run_both(spec: Spec, options: argparse.Namespace, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Kiln's result and TRL's, each from a process of its own."""
    with tempfile.TemporaryDirectory(prefix="against-trl-") as name:
        folder = Path(name)
        write_start(spec, folder / "start", rank)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # gives the GPU back at its end
            ours = pool.apply(kiln_sampled.run if spec["is_sampled"] else kiln_side.run, (spec,))
        if spec["recipe"] != "grpo":
            spec = spec | {"rows": kiln_side.rows_in_order(spec)}
        (folder / "spec.json").write_text(json.dumps(spec))
        command = [options.trl_python, _HERE / "trl_side.py", folder / "spec.json", folder / "result.json"]
        path = os.pathsep.join(filter(None, [options.trl_path, os.environ.get("PYTHONPATH")]))
        subprocess.run(
            command, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr
        )
        return ours, json.loads((folder / "result.json").read_text())


def distance(ours: list[float], theirs: list[float]) -> float:
    """The largest gap between two curves, of the range they span."""
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return max(gaps) / (max(ours) - min(ours))


def curves(options: argparse.Namespace) -> bool:
    """Write the steps of every recipe; returns whether each pair of curves stayed together."""
    folder = Path(os.environ.get("KILN_BENCH_RESULTS", RESULTS))
    rows, is_close = [], True
    for recipe in options.recipes:
        ours, theirs = run_both(curve_spec(recipe), options, rank=8)
        apart = distance(ours["losses"], theirs["losses"])
        is_close &= apart < _MOST_APART
        print(f"{recipe}: {len(ours['losses'])} steps, largest gap {apart:.1e} of the curve's range")
        columns = (ours["losses"], theirs["losses"], ours["grad_norms"], theirs["grad_norms"])
        for step, values in enumerate(zip(*columns, strict=True), 1):
            rows.append([recipe, step, *(f"{value:.6g}" for value in values)])
    versions = theirs["versions"]
    with (folder / "trl_curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("recipe", "step", "kiln_loss", "trl_loss", "kiln_grad_norm", "trl_grad_norm"))
        writer.writerows(rows)
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    plot = [options.trl_python, _HERE / "plot.py", folder / "trl_curves.csv", folder / "trl_curves.svg"]
    subprocess.run(plot, check=True)
    return is_close


def speed(options: argparse.Namespace) -> None:
    """Time the chosen workloads on both sides and add a row for each."""
    if options.tiny:
        os.environ.setdefault("KILN_BENCH_RESULTS", tempfile.mkdtemp(prefix="kiln-bench-"))
    results = ResultFile("trl", device_name(), _COLUMNS)
    for name, workload in WORKLOADS.items():
        if options.workloads and not any(part in name for part in options.workloads):
            continue
        if options.steps:
            workload = replace(workload, num_steps=options.steps)
        if options.tiny:
            workload = replace(
                workload, rows_per_step=4, prompt_tokens=5, completion_tokens=12, micro_rows=2, num_steps=5
            )
        spec = speed_spec(workload, options.model)
        ours, theirs = run_both(spec, options, rank=16)
        # The first steps compile kernels, allocate and draw.
        kiln_s, trl_s = (statistics.median(side["step_s"][2:]) for side in (ours, theirs))
        peaks = [side["peak_bytes"] / 2**30 for side in (ours, theirs)]
        versions = theirs["versions"]
        results.add(
            name,
            f"{Path(options.model).name}, rank 16, {spec['dtype']}",
            kiln_ms=1e3 * kiln_s,
            trl_ms=1e3 * trl_s,
            ratio=f"{trl_s / kiln_s:.2f}",
            kiln_tok_per_s=workload.num_tokens / kiln_s,
            trl_tok_per_s=workload.num_tokens / trl_s,
            kiln_peak_gib=f"{peaks[0]:.2f}",
            trl_peak_gib=f"{peaks[1]:.2f}",
            num_samples=len(theirs["step_s"]) - 2,
            note=f"trl {versions['trl']}, transformers {versions['transformers']} with its reference DeltaNet;"
            f" first losses {ours['losses'][0]:.4f}, {theirs['losses'][0]:.4f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("curves", "speed"))
    parser.add_argument("--recipes", nargs="+", default=["sft", "grpo", "opd"])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="checkpoint folder, for speed")
    parser.add_argument("--workloads", nargs="+", help="names or parts of names; all if left out")
    parser.add_argument(
        "--steps", type=int, default=0, help="speed: of each run; the first two are not counted"
    )
    parser.add_argument("--tiny", action="store_true", help="speed: sizes that run on a CPU in seconds")
    parser.add_argument("--trl-python", default=str(_TRL_PYTHON))
    parser.add_argument("--trl-path", default="", help="folder with TRL's packages, put before others")
    options = parser.parse_args()
    if options.mode == "curves":
        sys.exit(not curves(options))
    speed(options)


if __name__ == "__main__":
    main()
