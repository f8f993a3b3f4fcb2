"""`make demo` as a user runs it: what its last line promises."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


def test_the_demo_learns_from_the_reward_and_not_from_shuffled_ones(tmp_path):
    command = [sys.executable, "-m", "kiln_cli", "demo", "--json", "--state-dir", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout)  # one document and nothing else

    before, after, control = (result[key] for key in ("reward_before", "reward_after", "control_after"))
    assert 0.2 < before["mean"] < 0.7
    assert after["mean"] >= before["mean"] + 0.1
    assert after["low"] > before["high"]
    # Noise moves the control as far as noise can; a signal would move it like the adapter.
    assert control["mean"] - before["mean"] < (after["mean"] - before["mean"]) / 2
    assert min(entry["samples"] for entry in (before, after, control)) >= 64
    assert result["requests_failed"] == 0
    assert result["requests_total"] > 100
    assert result["base_sha256_before"] == result["base_sha256_after"]
    assert result["adapter"] == f"courteous@{result['rounds']}"
    assert "def score(prompt: str, answer: str)" in done.stderr  # the reward's source is shown
