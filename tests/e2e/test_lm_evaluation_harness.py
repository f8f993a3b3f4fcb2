"""lm-evaluation-harness against a whole stack gives the scores that Kiln's own evaluation gives."""

import asyncio
import json
import os

import pytest

from tests.support.gateway import REPOSITORY
from tests.support.stack import wait_for

pytestmark = pytest.mark.processes

TASKS = REPOSITORY / "tests/conformance/lm_eval"
DEMO_MODEL = REPOSITORY / "demo/model"


async def run(*command, folder):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=TASKS,
        env={**os.environ, **offline},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()[-4000:]


async def harness(stack, folder, task, model, route, *options):
    """Samples of a task by the position of their row."""
    arguments = f"model=base,base_url={stack.url}/v1/{route},num_concurrent=4,max_retries=1"
    if model == "local-completions":
        arguments += f",tokenizer={DEMO_MODEL}"
    await run(
        REPOSITORY / ".venv-clients/lm-eval/bin/lm_eval", "run", "--model", model, "--model_args", arguments,
        "--tasks", task, "--include_path", ".", "--output_path", folder / task, "--log_samples", *options,
        folder=folder,
    )  # fmt: skip
    (file,) = (folder / task).rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def own_scores(stack, rows):
    """Scores of the same questions by Kiln's own evaluation."""
    cases = [
        {"prompt": row["question"], "scorer": {"type": "numeric", "target": int(row["answer"])}}
        for row in rows
    ]
    assert stack.post("/v1/evals/suites", {"name": "harness", "cases": cases}).status_code == 201
    body = {"suite": "harness", "adapter": None, "sampling": {"max_tokens": 32}}
    path = f"/v1/evals/runs/{stack.post('/v1/evals/runs', body).json()['id']}"
    wait_for(lambda: stack.get(path)["status"] == "succeeded", "the run to succeed")
    return [case["score"] for case in stack.get(f"{path}?cases=true")["cases"]]


def own_logprob(stack, beginning, ending):
    """log p of " ending" after the beginning, from the prompt's own log-probabilities."""
    tokens = stack.post("/v1/tokenize", {"text": f"{beginning} {ending}"}).json()["tokens"]
    context = stack.post("/v1/tokenize", {"text": beginning}).json()["count"]
    body = {"model": "base", "prompt": tokens, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = stack.post("/v1/completions", body).json()["choices"][0]
    return sum(choice["logprobs"]["token_logprobs"][context:-1])


def test_the_harness_scores_as_kiln_does(stack, tmp_path):
    async def both():
        await run(REPOSITORY / "scripts/install_client.sh", "lm-eval", folder=tmp_path)
        return await asyncio.gather(
            harness(
                stack,
                tmp_path,
                "kiln_sums",
                "local-chat-completions",
                "chat/completions",
                "--apply_chat_template",
            ),
            harness(stack, tmp_path, "kiln_endings", "local-completions", "completions"),
        )

    sums, endings = asyncio.run(both())
    rows = [json.loads(line) for line in (TASKS / "sums.jsonl").read_text().splitlines()]
    scores = own_scores(stack, rows)
    assert [sample["exact_match"] for sample in sums] == scores
    assert 0 < sum(scores) < len(scores)  # some right, some wrong
    assert len(endings) == 6
    for sample in endings:
        doc = sample["doc"]
        given = [float(response[0][0]) for response in sample["resps"]]
        own = [own_logprob(stack, doc["beginning"], ending) for ending in doc["endings"]]
        # The same request in other batches: float32 sums in another order.
        assert given == pytest.approx(own, abs=1e-3)
