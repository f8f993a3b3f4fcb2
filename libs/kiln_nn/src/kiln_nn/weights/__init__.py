"""A checkpoint's tensors: their canonical names, how they are read, and the one arena they live in."""

from collections.abc import Mapping

import torch

from kiln_nn.weights.arena import ArenaReader, WeightArena
from kiln_nn.weights.loader import LoadedModel, load_checkpoint
from kiln_nn.weights.manifest import Manifest, TensorEntry
from kiln_nn.weights.names import TensorSpec, expected_tensors

Weights = Mapping[str, torch.Tensor]

__all__ = [
    "ArenaReader",
    "LoadedModel",
    "Manifest",
    "TensorEntry",
    "TensorSpec",
    "WeightArena",
    "Weights",
    "expected_tensors",
    "load_checkpoint",
]
