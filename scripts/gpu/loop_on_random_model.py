"""Serves a checkpoint with `kiln up`, samples, trains one GRPO job by completion id, and measures.

    python scripts/gpu/loop_on_random_model.py /tmp/random-4b [--gpu-sharing mps …]

Prints: start-up, decode tokens per second at several batch sizes, the job's time from POST to
`succeeded`, the swap, the trainer's and engine's GPU memory, and the arena's checksum before and
after.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc

from kiln_common.pb import engine_pb2, engine_pb2_grpc
from tests.support.stack import Stack


def row(name: str, value: Any) -> None:
    print(f"{name:<44} {value}", flush=True)


def engine_stub(stack: Stack) -> engine_pb2_grpc.EngineStub:
    return engine_pb2_grpc.EngineStub(grpc.insecure_channel(f"unix:{stack.state_dir}/run/engine.sock"))


def gpu_memory_by_pid() -> dict[int, str]:
    """MiB of GPU memory of each process, as nvidia-smi reports it."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return {int(pid): used.strip() for pid, used in (line.split(",") for line in lines if "," in line)}


def sample(stack: Stack, max_tokens: int, **fields: Any) -> dict[str, Any]:
    answer = stack.chat(
        "Write a short, friendly email reply.",
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=1.0,
        **fields,
    )
    answer.raise_for_status()
    return answer.json()


def decode_rate(stack: Stack, batch: int, max_tokens: int) -> float:
    """Tokens per second of `batch` requests sent at once, prefill included."""
    started_s = time.monotonic()
    with ThreadPoolExecutor(batch) as pool:
        answers = list(pool.map(lambda _: sample(stack, max_tokens), range(batch)))
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / (time.monotonic() - started_s)


def train_by_completion_id(stack: Stack) -> None:
    answer = sample(stack, 128, n=8)
    rollouts = [
        {"completion_id": answer["id"], "index": index, "reward": float(index % 2)} for index in range(8)
    ]
    started_s = time.monotonic()
    response = stack.post("/v1/train/grpo", {"adapter": "first", "groups": [{"rollouts": rollouts}]})
    response.raise_for_status()
    job = stack.wait_for_job(response.json()["id"])
    row("GRPO 8 x 128 tokens, POST to succeeded, s", f"{time.monotonic() - started_s:.2f}")
    row("job", f"{job['status']} {job['error'] or ''} sources {job['sources']}")
    if job["status"] != "succeeded":
        return
    row("training's part of the GPU", {k: v for k, v in job["metrics"].items() if k.startswith("gpu_")})
    row("commit to engine acknowledged, ms", f"{1000 * job['result']['swap_s']:.1f}")
    row("sampler-trainer KL per token", f"{job['metrics'].get('sampler_trainer_kl', float('nan')):.2e}")
    headers = stack.chat("Hello", max_tokens=1).headers
    row("next request answered by", headers["X-Kiln-Adapter"])


def main() -> None:
    model, *more = sys.argv[1:]  # the rest goes to `kiln up`
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        with Stack(Path(folder) / "s", "--model", model, *more) as stack:
            row("start to ready, s", f"{time.monotonic() - started_s:.1f}")
            engine = engine_stub(stack)
            before = engine.ChecksumWeights(engine_pb2.ChecksumWeightsRequest(), timeout=120).sha256
            sample(stack, 8)
            for batch in (1, 16, 64):
                decode_rate(stack, batch, 32)  # compiles what this batch size needs
                rate = decode_rate(stack, batch, 64)
                row(f"decode over HTTP, {batch} at once, tok/s", f"{rate:.0f}")
            train_by_completion_id(stack)
            memory = gpu_memory_by_pid()
            row("GPU memory, engine", memory.get(stack.pid("engine") or 0, memory))
            row("GPU memory, trainer", memory.get(stack.pid("trainer") or 0, memory))
            row("weight leases", engine.GetStats(engine_pb2.GetStatsRequest(), timeout=10).num_weight_leases)
            after = engine.ChecksumWeights(engine_pb2.ChecksumWeightsRequest(), timeout=120).sha256
            row("arena checksum unchanged", before == after)
            row("trainer status", json.dumps(stack.get("/v1/train/status")))


if __name__ == "__main__":
    main()
