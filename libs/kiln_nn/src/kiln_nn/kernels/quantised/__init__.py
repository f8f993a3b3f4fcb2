"""Weights of eight and four bits: what stands for such a matrix, and rounding to the nearest."""

from kiln_nn.kernels.quantised.frozen import dense, frozen_linear, tensors_of
from kiln_nn.kernels.quantised.matrix import FP8, GROUP_INPUTS, WORD_INPUTS, QuantisedMatrix, Scheme
from kiln_nn.kernels.quantised.reference import quantise_rtn
from kiln_nn.kernels.quantised.rows import (
    InputOrder,
    RoundedRows,
    Rows,
    round_groups,
    round_rows,
    unwritten_groups,
    whole,
)

__all__ = [
    "FP8",
    "GROUP_INPUTS",
    "WORD_INPUTS",
    "InputOrder",
    "QuantisedMatrix",
    "RoundedRows",
    "Rows",
    "Scheme",
    "dense",
    "frozen_linear",
    "quantise_rtn",
    "round_groups",
    "round_rows",
    "tensors_of",
    "unwritten_groups",
    "whole",
]
