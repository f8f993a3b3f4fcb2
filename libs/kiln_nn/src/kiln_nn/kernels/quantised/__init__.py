"""Weights of eight and four bits: what stands for such a matrix, and rounding to the nearest."""

from kiln_nn.kernels.quantised.frozen import dense, frozen_linear, tensors_of
from kiln_nn.kernels.quantised.matrix import FP8, GROUP_INPUTS, WORD_INPUTS, QuantisedMatrix, Scheme
from kiln_nn.kernels.quantised.reference import quantise_rtn

__all__ = [
    "FP8",
    "GROUP_INPUTS",
    "WORD_INPUTS",
    "QuantisedMatrix",
    "Scheme",
    "dense",
    "frozen_linear",
    "quantise_rtn",
    "tensors_of",
]
