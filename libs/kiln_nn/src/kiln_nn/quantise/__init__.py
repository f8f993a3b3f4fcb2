"""Quantising a checkpoint ahead of serving, with a calibration text if wanted, into a folder that others read."""

from kiln_nn.quantise.checkpoint import QuantisedFolder, quantise_checkpoint

__all__ = ["QuantisedFolder", "quantise_checkpoint"]
