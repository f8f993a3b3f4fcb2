"""Quantises a model layer by layer on a calibration text, each layer on what the quantised ones before it give.

Legend: `T` tokens, `D` hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import torch

from kiln_nn.blocks import LinearFn, Weights, base_linear, embed
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.quantised import GROUP_INPUTS, QuantisedMatrix
from kiln_nn.packed_model import PackedModel
from kiln_nn.quantise.gptq import Curvature, gptq
from kiln_nn.weights.names import is_quantisable

_BATCH_TOKENS = 4096

Documents = Sequence[Sequence[int]]
"""Token ids of texts, each of which stands for itself."""


@torch.no_grad()
def calibrated_layers(
    config: ModelConfig, weights: Weights, documents: Documents, device: torch.device
) -> Iterator[dict[str, QuantisedMatrix]]:
    """The matrices of one layer after the other in four bits, by canonical name."""
    weights = dict(weights)
    model = PackedModel(config, weights)
    batches = _batches(documents)
    hidden = [embed(weights, torch.tensor(list(chain(*batch)), device=device)) for batch in batches]
    bounds = [(0, *accumulate(len(document) for document in batch)) for batch in batches]
    for index in range(config.num_layers):
        curvatures: dict[tuple[str, ...], Curvature] = {}
        recording = _recording(base_linear(weights), curvatures)
        for hidden_TD, cu_seqlens in zip(hidden, bounds, strict=True):
            model.layer_output(index, hidden_TD, cu_seqlens, recording)
        matrices = _quantise(weights, curvatures)
        weights |= matrices
        hidden = [
            model.layer_output(index, hidden_TD, cu_seqlens)
            for hidden_TD, cu_seqlens in zip(hidden, bounds, strict=True)
        ]
        yield matrices


def _batches(documents: Documents) -> list[list[list[int]]]:
    """Documents in order, together as long as they stay below a number of tokens."""
    batches: list[list[list[int]]] = []
    num_tokens = _BATCH_TOKENS
    for document in documents:
        if num_tokens + len(document) > _BATCH_TOKENS:
            batches.append([])
            num_tokens = 0
        batches[-1].append(list(document))
        num_tokens += len(document)
    return batches


def _recording(linear: LinearFn, curvatures: dict[tuple[str, ...], Curvature]) -> LinearFn:
    """`linear`, which also counts what each group of layers reads."""

    def recorded(module_paths: Sequence[str], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        curvatures.setdefault(tuple(module_paths), Curvature()).add(x)
        return linear(module_paths, x)

    return recorded


def _quantise(weights: Weights, curvatures: dict[tuple[str, ...], Curvature]) -> dict[str, QuantisedMatrix]:
    matrices: dict[str, QuantisedMatrix] = {}
    for module_paths, curvature in curvatures.items():
        names = [name for path in module_paths if is_quantisable(name := f"{path}.weight")]
        names = [name for name in names if weights[name].shape[1] % GROUP_INPUTS == 0]
        if names:
            factor = curvature.inverse_factor()
            matrices |= {name: gptq(weights[name], factor) for name in names}
    return matrices
