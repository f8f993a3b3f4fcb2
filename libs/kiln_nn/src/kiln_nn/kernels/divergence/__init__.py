"""How far two distributions over the vocabulary are apart, straight from hidden states."""

from kiln_nn.kernels.divergence.reference import DivergenceKind, TokenDivergences, token_divergences

__all__ = ["DivergenceKind", "TokenDivergences", "token_divergences"]
