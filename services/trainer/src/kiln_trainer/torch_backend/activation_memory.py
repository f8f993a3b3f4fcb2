"""Whether a micro-batch's activations should be kept for the backward pass or computed again."""

from __future__ import annotations

from kiln_nn.config import ModelConfig

_KEPT_BYTES = 2 << 30  # beside an engine that owns the device's memory, and on a laptop
_BYTES_PER_VALUE = 4


def needs_recomputation(config: ModelConfig, batch_tokens: int, kept_bytes: int = _KEPT_BYTES) -> bool:
    """True if a micro-batch of `batch_tokens` would keep more than `kept_bytes`.

    An estimate: each token and layer keeps about twelve rows of the hidden width and six of the
    MLP's. Recomputing each layer costs a third more time and keeps one row.
    """
    values_per_token = config.num_layers * (12 * config.hidden_size + 6 * config.intermediate_size)
    return batch_tokens * values_per_token * _BYTES_PER_VALUE > kept_bytes
