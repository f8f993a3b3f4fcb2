"""Decides for every tensor of a checkpoint how it lies in the arena: in which format, or quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from kiln_nn.errors import InvalidQuantization
from kiln_nn.kernels.quantised import GROUP_INPUTS, Scheme
from kiln_nn.weights.checkpoint_files import Stored
from kiln_nn.weights.formats import StoredMatrix
from kiln_nn.weights.manifest import Form, Quantised
from kiln_nn.weights.names import TensorSpec, is_quantisable

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "fp8", "int4"]


def choose_forms(
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, Stored],
    device: torch.device,
    dtype: DtypeChoice | torch.dtype,
    quantization: Quantization,
) -> dict[str, Form]:
    """The form of every tensor of `specs`.

    What is stored quantised stays so where it may be. With a `quantization`, the other layers that may
    be are rounded to it; those whose inputs are not whole groups stay as they are.

    Raises:
        InvalidQuantization: the checkpoint is quantised in another way, or no layer fits.
    """
    scheme = None if quantization == "none" else quantization
    present = {one.format.scheme for one in stored.values() if isinstance(one, StoredMatrix)} - {None}
    if scheme and present - {scheme}:
        raise InvalidQuantization(
            f"quantization is {scheme}, but the checkpoint is {present.pop()} already",
            hint="Leave --quantization (KILN_ENGINE_QUANTIZATION) out, or serve the checkpoint that it was made from.",
        )
    forms: dict[str, Form] = {}
    for name, spec in specs.items():
        quantised = _quantised(stored[name], spec, scheme) if is_quantisable(name) else None
        forms[name] = quantised or _dtype(stored[name].dtype, spec, device, dtype)
    if scheme and not any(isinstance(form, Quantised) for form in forms.values()):
        raise InvalidQuantization(f"no layer's inputs are a multiple of {GROUP_INPUTS}, as {scheme} needs")
    return forms


def unquantised(forms: Mapping[str, Form]) -> list[str]:
    """Layers that could be quantised but for their widths, or that a checkpoint leaves out."""
    return [name for name, form in forms.items() if is_quantisable(name) and not isinstance(form, Quantised)]


def _quantised(stored: Stored, spec: TensorSpec, scheme: Scheme | None) -> Quantised | None:
    if isinstance(stored, StoredMatrix) and stored.format.scheme:
        return Quantised(stored.format.scheme, stored.scales_dtype)
    if scheme is None or (scheme == "int4" and spec.shape[1] % GROUP_INPUTS):
        return None
    is_exact = scheme == "fp8" or stored.dtype == torch.float32
    return Quantised(scheme, torch.float32 if is_exact else torch.bfloat16)


def _dtype(
    stored: torch.dtype, spec: TensorSpec, device: torch.device, choice: DtypeChoice | torch.dtype
) -> torch.dtype:
    if choice == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if spec.keeps_fp32 and stored == torch.float32:
        return stored
    return choice if isinstance(choice, torch.dtype) else getattr(torch, choice)
