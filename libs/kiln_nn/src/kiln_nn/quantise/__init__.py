"""Quantising a checkpoint ahead of serving, with a calibration text if wanted, into a folder that others read."""

from kiln_nn.quantise.checkpoint import QuantisedFolder, quantise_checkpoint
from kiln_nn.quantise.gptq import Curvature, gptq

__all__ = ["Curvature", "QuantisedFolder", "gptq", "quantise_checkpoint"]
