"""Root-mean-square norms: the layer norm and the DeltaNet's gated norm."""

from kiln_nn.kernels.rms_norm.reference import gated_rms_norm, l2_normalise, rms_norm

__all__ = ["gated_rms_norm", "l2_normalise", "rms_norm"]
