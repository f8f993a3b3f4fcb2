"""How far two distributions over the vocabulary are apart, straight from hidden states."""

from kiln_nn.kernels.divergence.reference import DivergenceKind, TokenDivergences, token_divergences
from kiln_nn.kernels.divergence.top_k import top_k_divergences

__all__ = ["DivergenceKind", "TokenDivergences", "token_divergences", "top_k_divergences"]
