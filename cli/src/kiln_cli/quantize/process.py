"""The process that quantises, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kiln_cli.errors import QuantizingFailed


def quantise(request: dict[str, Any], on_layer: Callable[[int, int], None]) -> dict[str, Any]:
    """Run `python -m kiln_nn.quantise`; `on_layer(num_done, num_layers)` is called behind each layer.

    Raises:
        QuantizingFailed: it refused, with its own code and hint, or broke down.
    """
    with tempfile.TemporaryDirectory(prefix="kiln-quantize-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        with (Path(folder) / "stderr").open("w+") as errors:
            command = [sys.executable, "-m", "kiln_nn.quantise", str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
                assert process.stdout is not None
                last: dict[str, Any] = {}
                for line in process.stdout:
                    last = json.loads(line)
                    if "done" in last:
                        on_layer(last["done"], last["of"])
            errors.seek(0)
            said = errors.read().strip().splitlines()
    if "error" in last:
        raise QuantizingFailed(**last["error"])
    if process.returncode:
        reason = said[-1] if said else f"exit code {process.returncode}"
        raise QuantizingFailed("quantizing_failed", reason[:500], QuantizingFailed.hint)
    return last
