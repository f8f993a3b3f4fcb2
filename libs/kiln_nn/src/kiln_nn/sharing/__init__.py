"""Memory for two processes: the engine's weights for the trainer, the trainer's adapters for the engine."""

from kiln_nn.sharing.adapter_inbox import AdapterInbox, AdapterRefused, HandedAdapter
from kiln_nn.sharing.client import SharedWeights, attach
from kiln_nn.sharing.leases import wait_for_old_leases
from kiln_nn.sharing.sealed_adapter import SealedAdapter
from kiln_nn.sharing.server import WeightServer

__all__ = [
    "AdapterInbox",
    "AdapterRefused",
    "HandedAdapter",
    "SealedAdapter",
    "SharedWeights",
    "WeightServer",
    "attach",
    "wait_for_old_leases",
]
