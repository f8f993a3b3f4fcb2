"""One copy of the weights for two processes: the engine serves its arena, the trainer maps it."""

from kiln_nn.sharing.client import SharedWeights, attach
from kiln_nn.sharing.leases import wait_for_old_leases
from kiln_nn.sharing.server import WeightServer

__all__ = ["SharedWeights", "WeightServer", "attach", "wait_for_old_leases"]
