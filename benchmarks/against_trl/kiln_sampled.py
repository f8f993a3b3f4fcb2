"""A distillation job that samples its own completions, on a whole stack: engine, trainer and registry.

TRL's trainer generates with the model that it trains; here the engine draws each step's completions.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.against_trl.kiln_side import Spec
from kiln_common.clients.trainer import TrainerClient
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_nn.lora.peft_format import CONFIG_FILE, WEIGHTS_FILE
from tests.support.stack import Stack

_NAME = "compared"


def run(spec: Spec) -> dict[str, Any]:
    """Losses and seconds of every step, from the end of one to the end of the next. Fails with the job."""
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        stack = Stack(Path(folder) / "s", "--model", spec["model"])
        with stack:
            names, start = (CONFIG_FILE, WEIGHTS_FILE), Path(spec["adapter"])
            files = [
                ("file", (name, (start / name).read_bytes(), "application/octet-stream")) for name in names
            ]
            upload = httpx.post(
                f"{stack.url}/v1/adapters/upload", files=files, data={"name": _NAME}, timeout=60
            )
            upload.raise_for_status()
            return asyncio.run(_train(f"unix:{stack.state_dir}/run/trainer.sock", spec))


async def _train(address: str, spec: Spec) -> dict[str, Any]:
    trainer = TrainerClient(address)
    steps: list[tuple[float, dict[str, Any]]] = []
    try:
        job = await trainer.submit(_request(spec))
        async for event in trainer.watch(job.id):
            data = json.loads(event.data_json)
            if event.type == "step":
                steps.append((event.at_s, data))
            assert event.type not in ("failed", "cancelled"), data
    finally:
        await trainer.close()
    return {
        "losses": [data["metrics"]["loss"] for _, data in steps],
        "step_s": [after - before for (before, _), (after, _) in pairwise(steps)],
        "peak_bytes": 0,  # of two processes: not measured here
    }


def _request(spec: Spec) -> trainer_pb2.SubmitRequest:
    longest = max(len(row["completion"]) for row in spec["rows"])
    sampling = engine_pb2.SamplingParams(
        max_tokens=longest, temperature=1, top_p=1, repetition_penalty=1, ignore_eos=True
    )
    settings = trainer_pb2.OpdSettings(
        teacher="base", sampling=sampling, samples_per_prompt=1, prompts_per_step=spec["rows_per_step"]
    )
    prompts = [trainer_pb2.OpdPrompt(token_ids=row["prompt"]) for row in spec["rows"]]
    config = trainer_pb2.JobConfig(
        adapter=_NAME,
        base_adapter=f"{_NAME}@1",
        epochs=1,
        batch_tokens=spec["rows_per_step"] * (len(spec["rows"][0]["prompt"]) + longest),
        seed=spec["seed"],
        checkpoint_every=1_000_000,
        publish="never",
        optimizer=trainer_pb2.OptimizerConfig(learning_rate=spec["learning_rate"], max_grad_norm=1.0),
    )
    return trainer_pb2.SubmitRequest(
        config=config, opd=trainer_pb2.OpdSpec(settings=settings, prompts=prompts)
    )
