"""docs/client.md as it stands, block after block, against the embedded default."""

import contextlib
import re
from pathlib import Path

import pytest

import kiln

pytestmark = pytest.mark.processes
PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"


def test_every_block_of_the_page_runs(stack, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KILN_URL", stack.url)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        with contextlib.suppress(kiln.NotBuiltError):  # a route of the contract that answers 501
            exec(compile(block, PAGE.name, "exec"), scope)

    printed, progress = capsys.readouterr()
    assert all(f"step {step}: mean reward" in printed for step in range(5))
    assert progress.count(" succeeded kind@") == 5
    assert "succeeded who@1" in printed
    assert "no_learning_signal -" in printed
    assert stack.get("/v1/adapters/kind")["latest_version"] == 5
    assert stack.get("/v1/adapters/kind-copy")["latest_version"] == 1


def test_a_cancelled_job_is_an_exception_with_the_jobs_state(stack):
    with kiln.Client(stack.url) as client:
        examples = [
            {"prompt": f"What is {number} + 1?", "completion": str(number + 1)} for number in range(40)
        ]
        job = client.train.sft("never", examples, epochs=1000, attach=False)
        assert job.cancel().status in ("queued", "running", "cancelled")
        with pytest.raises(kiln.JobCancelled) as caught:
            job.wait()
    assert caught.value.job.id == job.id
    assert job.version is None
