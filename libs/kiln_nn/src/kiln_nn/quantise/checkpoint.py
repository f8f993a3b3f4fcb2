"""From a checkpoint folder to a quantised one, in the format of compressed-tensors.

The result is the text model alone: a vision tower is left out. Its linear layers are named as they
were; what is not quantised has the format it had.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kiln_nn.config import read_json
from kiln_nn.errors import InvalidQuantization
from kiln_nn.kernels.quantised import FP8, GROUP_INPUTS, QuantisedMatrix, Scheme, quantise_rtn
from kiln_nn.quantise.calibration import Documents, calibrated_layers
from kiln_nn.quantise.folder_writer import FolderWriter
from kiln_nn.weights import LoadedModel, load_checkpoint
from kiln_nn.weights.checkpoint_files import StoredTensor, scan_folder
from kiln_nn.weights.formats import stored_format
from kiln_nn.weights.formats.compressed_tensors import FORMAT_OF, quantization_config
from kiln_nn.weights.names import EMBEDDING, HEAD, is_quantisable

Method = Literal["rtn", "gptq"]
LayerProgress = Callable[[int, int], None]
_WEIGHT_PATTERNS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class QuantisedFolder:
    """What was written: bytes of all tensors, quantised layers, and linear layers that stay as they were."""

    num_bytes: int
    num_quantised: int
    plain_modules: tuple[str, ...]


def quantise_checkpoint(
    folder: Path,
    out: Path,
    scheme: Scheme,
    method: Method,
    documents: Documents = (),
    device: str | torch.device = "cpu",
    progress: LayerProgress | None = None,
) -> QuantisedFolder:
    """Quantise the decoder's large matrices of the checkpoint in `folder` into the new folder `out`.

    `documents`: token ids of the calibration text; `gptq` needs them.
    `progress(num_done, num_layers)` is called behind each layer.

    Raises:
        InvalidQuantization: the method does not go with the scheme, lacks text, `out` is in use, or no
            layer's inputs are whole groups.
        Whatever `load_checkpoint` raises.
    """
    _check(folder, out, scheme, method, documents)
    loaded = load_checkpoint(folder, device)
    stored, _ = scan_folder(folder)
    views = loaded.arena.views()
    if not any(_fits(name, view, scheme) for name, view in views.items()):
        raise InvalidQuantization(f"no layer's inputs are a multiple of {GROUP_INPUTS}, as {scheme} needs")
    writer = FolderWriter(out)
    quantised: list[str] = []
    layers = _calibrated(loaded, documents) if method == "gptq" else _rounded(loaded, stored, scheme)
    for num_done, matrices in enumerate(layers, start=1):
        for name, matrix in matrices.items():
            for part, tensor in FORMAT_OF[scheme].write(matrix).items():
                writer.add(f"{name.removesuffix('weight')}{part}", tensor)
        quantised += matrices
        if progress:
            progress(num_done, loaded.config.num_layers)
    plain = {name: view for name, view in views.items() if name not in quantised}
    for name, view in plain.items():
        if name != HEAD or not loaded.config.tie_word_embeddings:
            writer.add(name, view.to(stored[name].dtype))
    writer.finish()
    linears = {name: view for name, view in plain.items() if view.dim() == 2 and name != EMBEDDING}
    modules = tuple(name.removesuffix(".weight") for name in linears)
    _write_config(folder, out, loaded, stored[EMBEDDING].dtype, quantization_config(scheme, modules))
    return QuantisedFolder(writer.num_bytes, len(quantised), modules)


_OUT_HINT = "Name a folder with --out that is not there yet, or is empty."


def _check(folder: Path, out: Path, scheme: Scheme, method: Method, documents: Documents) -> None:
    if stored_format(read_json(folder / "config.json")) is not None:
        hint = "It can be served as it is; quantise the checkpoint that it was made from."
        raise InvalidQuantization(f"{folder} is quantised already", hint=hint)
    if out.exists() and not out.is_dir():
        raise InvalidQuantization(f"{out} is not a folder", hint=_OUT_HINT)
    if out.exists() and any(out.iterdir()):
        raise InvalidQuantization(f"{out} is not empty", hint=_OUT_HINT)
    if method == "gptq" and scheme != "int4":
        hint = "--method rtn rounds to both."
        raise InvalidQuantization(f"gptq rounds to int4, not to {scheme}", hint=hint)
    if method == "gptq" and not any(documents):
        hint = "--calibration FILE gives one; --method rtn needs none."
        raise InvalidQuantization("gptq needs a calibration text, and there is none", hint=hint)


def _calibrated(loaded: LoadedModel, documents: Documents) -> Iterator[dict[str, QuantisedMatrix]]:
    views = loaded.arena.views()
    return calibrated_layers(loaded.config, views, documents, views[EMBEDDING].device)


def _rounded(
    loaded: LoadedModel, stored: dict[str, StoredTensor], scheme: Scheme
) -> Iterator[dict[str, QuantisedMatrix]]:
    views = loaded.arena.views()
    for index in range(loaded.config.num_layers):
        names = [name for name in views if name.startswith(f"model.layers.{index}.")]
        yield {
            name: _round(views[name].to(stored[name].dtype), scheme)
            for name in names
            if _fits(name, views[name], scheme)
        }


def _fits(name: str, weight: torch.Tensor, scheme: Scheme) -> bool:
    return is_quantisable(name) and (scheme == "fp8" or weight.shape[1] % GROUP_INPUTS == 0)


def _round(weight_OI: torch.Tensor, scheme: Scheme) -> QuantisedMatrix:
    """To nearest, under scales that bfloat16 can hold: other engines keep them in the model's format."""
    matrix = quantise_rtn(weight_OI.bfloat16(), scheme)
    if scheme == "int4":
        return matrix
    scales = matrix.scales.bfloat16().float()
    largest = torch.finfo(FP8).max
    numbers = (weight_OI.float() / scales).clamp(-largest, largest)
    return QuantisedMatrix("fp8", numbers.to(FP8), scales)


def _write_config(
    folder: Path, out: Path, loaded: LoadedModel, dtype: torch.dtype, quantization: dict[str, Any]
) -> None:
    """Everything but the weights: config.json last, so that a folder that has one is whole."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHT_PATTERNS):
            shutil.copy(path, out)
    config = loaded.config.to_hf_dict() | {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": quantization,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
