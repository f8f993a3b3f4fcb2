"""Recurrent-state slots as numbers."""

from __future__ import annotations

from kiln_common.errors import KilnError
from kiln_engine.domain.errors import OutOfStateSlots
from kiln_engine.scheduling.id_pool import IdPool


class StatePool(IdPool):
    """Counts slots for DeltaNet states; the tensors live in StateStore.

    A slot is live (owned by one running sequence, with a ring) or a checkpoint (owned by the prefix
    tree, read by any number of sequences, written by none).
    """

    def _exhausted(self, wanted: int) -> KilnError:
        return OutOfStateSlots(wanted=wanted, free=self.num_free)
