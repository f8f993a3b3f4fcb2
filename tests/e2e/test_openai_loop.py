"""The loop of the README, with the real clients and real processes."""

import re
from pathlib import Path

import openai
import pytest
import requests

pytestmark = pytest.mark.processes


def test_the_openai_loop_is_answered_by_the_version_it_trained(stack):
    def score(prompt: str, answer: str) -> float:
        return float(len(set(answer)))

    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0)
    prompt = "Write a short, friendly email reply."
    rollouts = [
        client.chat.completions.create(
            model="Qwen/Qwen3.5-4B", messages=[{"role": "user", "content": prompt}], temperature=1.0, n=1
        )
        .choices[0]
        .message.content
        for _ in range(8)
    ]
    rewards = [score(prompt, r) for r in rollouts]
    response = requests.post(
        f"{stack.url}/v1/train/grpo",
        json={
            "adapter": "helpful-v3",
            "prompt": prompt,
            "completions": rollouts,
            "rewards": rewards,
            "learning_rate": 1e-4,
        },
    )
    assert response.status_code == 202, response.text
    job = stack.wait_for_job(response.json()["id"])
    assert job["status"] == "succeeded", job
    assert job["result"]["adapter"] == "helpful-v3"
    assert job["result"]["not_live"] == []
    # Every completion was found again as a kept rollout: exact tokens, nothing tokenised anew.
    assert job["sources"] == {"rollout": 8}

    answer = client.chat.completions.with_raw_response.create(
        model="Qwen/Qwen3.5-4B", messages=[{"role": "user", "content": prompt}], max_tokens=8
    )
    assert answer.headers["X-Kiln-Adapter"] == f"helpful-v3@{job['result']['version']}"


def test_the_readmes_loop_runs_as_it_stands(stack, capsys):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    code = re.search(r"```python\n(import httpx.*?)```", readme, re.DOTALL)[1]
    exec(compile(code.replace("http://localhost:8420", stack.url), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert [f"step {step}:" in printed for step in range(10)] == [True] * 10
    assert stack.get("/v1/adapters/helpful")["versions"][-1]["version"] == 10
    assert stack.chat("Hello", max_tokens=1).headers["X-Kiln-Adapter"] == "helpful@10"
