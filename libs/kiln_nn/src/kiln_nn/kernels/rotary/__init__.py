"""Rotary position embedding on the first part of each attention head."""

from kiln_nn.kernels.rotary.reference import apply_rotary, cos_and_sin, inverse_frequencies, rotary_tables

__all__ = ["apply_rotary", "cos_and_sin", "inverse_frequencies", "rotary_tables"]
