"""Rotary position embedding on the first part of each attention head."""

from kiln_nn.kernels.rotary.reference import apply_rotary, rotary_tables

__all__ = ["apply_rotary", "rotary_tables"]
