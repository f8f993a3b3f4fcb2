"""Causal attention over packed documents that bring their whole past with them (training)."""

from kiln_nn.kernels.varlen_attention.reference import varlen_attention

__all__ = ["varlen_attention"]
