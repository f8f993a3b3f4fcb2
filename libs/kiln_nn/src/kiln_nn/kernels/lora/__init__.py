"""Low-rank update of one linear layer."""

from kiln_nn.kernels.lora.reference import lora_delta

__all__ = ["lora_delta"]
