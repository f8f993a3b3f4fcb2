"""The gated delta rule: the recurrence of a DeltaNet layer.

Every form takes the same inputs: `q` and `k` already L2-normalised, `q` already scaled by
`K^-0.5`, the log-decay `g <= 0` and the write strength `beta`, with key heads shared by
consecutive value heads.
"""

from kiln_nn.kernels.gated_delta.chunked import DeltaRun, gated_delta_chunked
from kiln_nn.kernels.gated_delta.inputs import delta_rule_gates, delta_rule_heads
from kiln_nn.kernels.gated_delta.recurrent import gated_delta_recurrent
from kiln_nn.kernels.gated_delta.ring import (
    DeltaRing,
    RingStep,
    gated_delta_ring_commit,
    gated_delta_ring_step,
    ring_mask,
)
from kiln_nn.kernels.gated_delta.ring_lines import RingLines, gated_delta_ring_lines

__all__ = [
    "DeltaRing",
    "DeltaRun",
    "RingLines",
    "RingStep",
    "delta_rule_gates",
    "delta_rule_heads",
    "gated_delta_chunked",
    "gated_delta_recurrent",
    "gated_delta_ring_commit",
    "gated_delta_ring_lines",
    "gated_delta_ring_step",
    "ring_mask",
]
