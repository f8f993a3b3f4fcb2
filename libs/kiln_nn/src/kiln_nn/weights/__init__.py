"""A checkpoint's tensors: their canonical names, how they are read, and the one arena they live in."""

from kiln_nn.weights.arena import ArenaReader, WeightArena
from kiln_nn.weights.loader import LoadedModel, load_checkpoint
from kiln_nn.weights.manifest import Manifest, TensorEntry
from kiln_nn.weights.names import TensorSpec, expected_tensors

__all__ = [
    "ArenaReader",
    "LoadedModel",
    "Manifest",
    "TensorEntry",
    "TensorSpec",
    "WeightArena",
    "expected_tensors",
    "load_checkpoint",
]
