"""What a write to a borrowed weight does to `kiln up`: who dies, and how long nobody answers.

    python scripts/gpu/weight_fault.py --model FOLDER [--gpu-sharing time_slices mps]

For each way of sharing the GPU it starts `kiln up`, asks a question, has a process that maps the
engine's weights as the trainer does write to one of them, and asks again until the same answer comes.
By turns only the writer dies; under MPS everything on the GPU does, and the supervisor starts it again.
Under MPS it faults the GPU for every client of this server: run it last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.stack import Stack

_START_TIMEOUT_S, _RECOVERY_TIMEOUT_S, _RETRY_S = 300.0, 200.0, 0.05
_WRITER = """
import sys, torch
from kiln_nn.sharing.client import attach
with attach(sys.argv[1]) as weights:
    name, view = next(iter(weights.views().items()))
    print("writing", name, flush=True)
    view.fill_(0)
    torch.cuda.synchronize()
"""


def answer(stack: Stack) -> list[int] | None:
    """Tokens of one greedy answer, or None while there is none to be had."""
    try:
        reply = stack.chat(
            "Who goes there?", max_tokens=32, temperature=0, return_token_ids=True, store=False
        )
    except httpx.HTTPError:
        return None
    return reply.json()["choices"][0]["token_ids"] if reply.status_code == 200 else None


def try_write(model: Path, sharing: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kf") as name:
        stack = Stack(Path(name), "--model", str(model), "--gpu-sharing", sharing)
        stack.start(_START_TIMEOUT_S)
        try:
            before, engine, trainer = answer(stack), stack.pid("engine"), stack.pid("trainer")
            pipe = Path(name) / "run" / "mps"
            env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(pipe if sharing == "mps" else "none")}
            sockets = [str(path) for path in (Path(name) / "run").rglob("*weights*")]
            writer = subprocess.run(
                [sys.executable, "-c", _WRITER, sockets[0]],
                env=env,
                capture_output=True,
                text=True,
                check=False,
                timeout=_RECOVERY_TIMEOUT_S,
            )
            died_s = time.monotonic()
            num_failed, after = 0, answer(stack)
            while after is None and time.monotonic() < died_s + _RECOVERY_TIMEOUT_S:
                num_failed += 1
                time.sleep(_RETRY_S)
                after = answer(stack)
            answered_s = time.monotonic() - died_s
            stack.wait_until_ready(_RECOVERY_TIMEOUT_S)
            print(
                f"{sharing}: the writer ended with code {writer.returncode}"
                f" ({(writer.stderr.strip().splitlines() or ['without a word'])[-1][:90]});"
                f" engine {'lived' if stack.pid('engine') == engine else 'started again'},"
                f" trainer {'lived' if stack.pid('trainer') == trainer else 'started again'};"
                f" {num_failed} questions failed, first answer after {answered_s:.2f} s,"
                f" {'the same tokens' if before and after == before else f'{before} became {after}'};"
                f" ready for jobs after {time.monotonic() - died_s:.2f} s",
                flush=True,
            )
        finally:
            stack.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    ways = ("time_slices", "mps")
    parser.add_argument("--gpu-sharing", nargs="+", choices=ways, default=list(ways))
    options = parser.parse_args()
    for sharing in options.gpu_sharing:
        try_write(options.model, sharing)


if __name__ == "__main__":
    main()
