"""Serves a checkpoint with `kiln up`, samples, trains one GRPO job by completion id, and measures.

    python scripts/gpu/loop_on_random_model.py /tmp/random-4b [--gpu-sharing mps …]
    python scripts/gpu/loop_on_random_model.py /tmp/random-4b --engines 2   # on two GPUs
    KILN_TRAINER_DEVICE=cuda:1 python scripts/gpu/loop_on_random_model.py /tmp/random-4b   # likewise

Prints: start-up, decode tokens per second at several batch sizes, the job's time from POST to
`succeeded`, the swap, the trainer's and engine's GPU memory, and each arena's checksum before and
after. With several engines also: one is drained under load, and every request counted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc
import httpx

from kiln_common.pb import engine_pb2, engine_pb2_grpc
from tests.support.stack import Stack, wait_for

_START_TIMEOUT_S = 400.0  # the first start on a kind of GPU compiles


def row(name: str, value: Any) -> None:
    print(f"{name:<44} {value}", flush=True)


def engine_stubs(stack: Stack) -> dict[str, engine_pb2_grpc.EngineStub]:
    """Of every engine, once all are listening: the stack is ready with the first."""
    names = [path.stem for path in sorted((stack.state_dir / "pids").glob("engine*.pid"))]
    sockets = [stack.state_dir / "run" / f"{name}.sock" for name in names]
    wait_for(lambda: all(path.exists() for path in sockets), f"{sockets}", _START_TIMEOUT_S)
    return {path.stem: engine_pb2_grpc.EngineStub(grpc.insecure_channel(f"unix:{path}")) for path in sockets}


def checksums(engines: dict[str, engine_pb2_grpc.EngineStub]) -> list[str]:
    request = engine_pb2.ChecksumWeightsRequest()
    return [engine.ChecksumWeights(request, timeout=120).sha256 for engine in engines.values()]


def gpu_memory_by_pid() -> dict[int, str]:
    """MiB of GPU memory of each process, as nvidia-smi reports it; none without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
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


def drain_one_under_load(stack: Stack, clients: int = 32, num_requests: int = 128) -> None:
    """SIGTERM for the first engine while clients that never retry wait for answers."""
    pid = stack.pid("engine")
    assert pid is not None
    with ThreadPoolExecutor(clients) as pool:
        answers = [
            pool.submit(stack.chat, "Write a letter.", max_tokens=128, ignore_eos=True, return_token_ids=True)
            for _ in range(num_requests)
        ]
        wait_for(lambda: sum(answer.done() for answer in answers) >= clients, "the first answers")
        os.kill(pid, signal.SIGTERM)
        codes = Counter(answer.result().status_code for answer in answers)
    lengths = Counter(answer.result().json()["usage"]["completion_tokens"] for answer in answers)
    row("an engine drained under load: status codes; lengths", f"{dict(codes)}; {dict(lengths)}")
    lines = httpx.get(f"{stack.url}/metrics").text.splitlines()
    moved = [line for line in lines if line.startswith("kiln_gateway_requests_moved_total{")]
    row("requests that changed engines", moved)


def main() -> None:
    model, *more = sys.argv[1:]  # the rest goes to `kiln up`
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        stack = Stack(Path(folder) / "s", "--model", model, *more)
        stack.start(_START_TIMEOUT_S)
        try:
            row("start to ready, s", f"{time.monotonic() - started_s:.1f}")
            engines = engine_stubs(stack)
            before = checksums(engines)
            sample(stack, 8)
            for batch in (1, 16, 64, *[128] * (len(engines) > 1)):
                decode_rate(stack, batch, 32)  # compiles what this batch size needs
                rate = decode_rate(stack, batch, 64)
                row(f"decode over HTTP, {batch} at once, tok/s", f"{rate:.0f}")
            train_by_completion_id(stack)
            memory = gpu_memory_by_pid()
            for name, engine in engines.items():
                row(f"GPU memory, {name}", memory.get(stack.pid(name) or 0, memory))
                stats = engine.GetStats(engine_pb2.GetStatsRequest(), timeout=10)
                drawn, leases = stats.num_generated_tokens, stats.num_weight_leases
                row(f"{name}: tokens drawn, weight leases", f"{drawn}, {leases}")
            for name in ("trainer", "trainer-2"):
                if pid := stack.pid(name):
                    row(f"GPU memory, {name}", memory.get(pid, memory))
            row("arenas' checksums unchanged", before == checksums(engines))
            row("trainer status", json.dumps(stack.get("/v1/train/status")))
            if len(engines) > 1:
                drain_one_under_load(stack)
        finally:
            stack.stop()


if __name__ == "__main__":
    main()
