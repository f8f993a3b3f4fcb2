"""Short depthwise causal convolution with SiLU, in front of the DeltaNet recurrence."""

from kiln_nn.kernels.causal_conv.reference import causal_conv, causal_conv_step

__all__ = ["causal_conv", "causal_conv_step"]
