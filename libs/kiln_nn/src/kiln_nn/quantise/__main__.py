"""What `kiln quantize` runs in a process of its own: its own has no torch.

`python -m kiln_nn.quantise REQUEST`, a JSON file with the arguments of `quantise_checkpoint`. Prints JSON
lines: {"done", "of"} behind each layer, and at the end the result, or {"error"} and exit code 2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kiln_nn.errors import KilnNnError
from kiln_nn.quantise import quantise_checkpoint


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Quantise as the request says; paths and device become what they stand for."""
    device = request["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    result = quantise_checkpoint(
        Path(request["folder"]),
        Path(request["out"]),
        request["scheme"],
        request["method"],
        request["documents"],
        device,
        lambda done, of: _say({"done": done, "of": of}),
    )
    return asdict(result)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(request_path: str) -> int:
    try:
        _say(run(json.loads(Path(request_path).read_text(encoding="utf-8"))))
    except KilnNnError as error:
        _say({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
