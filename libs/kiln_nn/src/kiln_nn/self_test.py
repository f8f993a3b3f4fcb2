"""What `kiln doctor --strict` asks of this machine: does a kernel compute, can two processes share weights.

`python -m kiln_nn.self_test kernel` and `python -m kiln_nn.self_test share MODEL_FOLDER` print one line of
JSON, {"is_ok", "detail"}, and end with code 0. `attach SOCKET` is the second process of `share`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kiln_nn.kernels.dispatch import why_no_kernels
from kiln_nn.kernels.rms_norm import reference, rms_norm
from kiln_nn.sharing import WeightServer, attach
from kiln_nn.weights import load_checkpoint

_ATTACH_TIMEOUT_S = 60.0
# Of the result's largest value: half a step of bfloat16's 8 bits, and float32 sums.
_TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


def device() -> torch.device:
    """The one that the engine would take."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernel() -> tuple[bool, str]:
    """Run the layer norm as serving does and compare it with the reference in float64."""
    where = device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)
    x_TD = torch.randn(33, 2560, generator=draw).to(dtype)
    weight_D = torch.randn(2560, generator=draw).to(dtype)
    found = rms_norm(x_TD.to(where), weight_D.to(where), 1e-6, offset=1.0).cpu()
    expected = reference.rms_norm(x_TD.double(), weight_D.double(), 1e-6, offset=1.0)
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    why_not = why_no_kernels(where) if where.type == "cuda" else "there is no GPU"
    how = "Triton" if why_not is None else f"plain torch ({why_not})"
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    return error <= _TOLERANCE[
        dtype
    ], f"{how} on {name}, torch {torch.__version__}, relative error {error:.1e}"


def share(model_folder: str) -> tuple[bool, str]:
    """Load a model, let a second process map its weights, and compare what both see."""
    where = device()
    loaded = load_checkpoint(model_folder, where)
    with tempfile.TemporaryDirectory(prefix="kiln-share-") as folder:
        socket_path = Path(folder) / "private" / "weights.sock"
        with WeightServer(loaded.arena, socket_path):
            command = [sys.executable, "-m", "kiln_nn.self_test", "attach", str(socket_path)]
            reader = subprocess.run(
                command, capture_output=True, text=True, timeout=_ATTACH_TIMEOUT_S, check=False
            )
        if reader.returncode:
            last = (reader.stderr.strip().splitlines() or [f"exit code {reader.returncode}"])[-1]
            return False, f"the second process could not map the weights: {last}"
        seen = json.loads(reader.stdout)
        mib = loaded.manifest.nbytes / 2**20
        is_same = seen == {"checksum": loaded.arena.checksum(), "copied_bytes": 0}
        what = f"{mib:.0f} MiB on {where.type} by {loaded.manifest.transport}"
    loaded.arena.close()
    return is_same, f"{what}, both processes see the same bytes" if is_same else f"{what}: {seen} differs"


def attach_and_report(socket_path: str) -> None:
    with attach(socket_path) as shared:
        views = shared.views()
        answer = {"checksum": shared.checksum(), "copied_bytes": shared.num_foreign_bytes(views)}
        del views
    print(json.dumps(answer))


def main(what: str, *arguments: str) -> None:
    if what == "attach":
        attach_and_report(*arguments)
        return
    is_ok, detail = kernel() if what == "kernel" else share(*arguments)
    print(json.dumps({"is_ok": is_ok, "detail": detail}))


if __name__ == "__main__":
    main(*sys.argv[1:])
