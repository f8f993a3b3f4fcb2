"""Log-probabilities and entropies of given tokens, straight from hidden states."""

from kiln_nn.kernels.logprobs.reference import TokenLogprobs, token_logprobs

__all__ = ["TokenLogprobs", "token_logprobs"]
