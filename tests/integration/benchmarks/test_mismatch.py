"""The script that compares sampler and trainer on a GPU, small, on the demo model on a CPU."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
MODEL = REPOSITORY / "demo" / "model"


def test_sampler_and_trainer_agree_on_every_kind_of_token():
    command = [sys.executable, REPOSITORY / "scripts/gpu/mismatch.py", "--model", MODEL, "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = ("decode", "chunked prefill", "prefix hits", "with an adapter")
    row = re.compile(r"^(.+?) +([\d.]+) +([\d.]+) +(\d+) +(\S+) +(\S+) +(\S+)$", re.MULTILINE)
    rows = row.findall(done.stdout)
    assert [name for name, *_ in rows] == [*kinds, *kinds]
    # Both compute in float32: sums in another order, and nothing else.
    assert all(float(kl) < 1e-9 and float(largest) < 1e-3 for *_, kl, _, largest in rows), done.stdout
    assert all(int(num_tokens) >= 32 for _, _, _, num_tokens, *_ in rows)
