"""A bigger model with the demo model's tokenizer, and an engine of its own that serves it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
_SHARPER = 1.5


def make_bigger_demo(folder: Path) -> None:
    """The demo model with two more layers, surer of what it says: its logits are half as large again.

    What the new layers would add is zero, so that the model still writes English.
    """
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("training.json"))
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    num_layers = config["num_hidden_layers"]
    for new, old in enumerate((3, 4), start=num_layers):  # an attention layer and a DeltaNet layer
        prefix = f"model.layers.{old}."
        for name in [name for name in tensors if name.startswith(prefix)]:
            copy = tensors[name].clone()
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                copy.zero_()
            tensors[f"model.layers.{new}.{name.removeprefix(prefix)}"] = copy
        config["layer_types"].append(config["layer_types"][old])
    config["num_hidden_layers"] = num_layers + 2
    # The final norm multiplies by 1 + w.
    tensors["model.norm.weight"] = (1 + tensors["model.norm.weight"].float()) * _SHARPER - 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def engine_process(folder: Path, model: Path, name: str, **settings: str) -> Iterator[str]:
    """An engine of `model` under `name`; yields its address. It may still be loading."""
    address = f"unix:{folder}/engine.sock"
    fields = {"MODEL_PATH": str(model), "SERVED_MODEL_NAME": name, "LISTEN": address, "DEVICE": "cpu"}
    fields |= {"SOCKET_DIR": str(folder / "sockets"), **settings}
    env = {f"KILN_ENGINE_{key}": value for key, value in fields.items()}
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kiln_engine"],
            env={**os.environ, **env},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(60)
