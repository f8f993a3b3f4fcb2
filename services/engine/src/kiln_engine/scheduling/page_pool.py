"""KV pages as numbers."""

from __future__ import annotations

from kiln_common.errors import KilnError
from kiln_engine.domain.errors import OutOfPages
from kiln_engine.scheduling.id_pool import IdPool


class PagePool(IdPool):
    """Counts KV pages; the tensors live in KvStore.

    A page is `page_tokens` consecutive tokens of K and V across all full-attention layers.
    Sequences and the prefix tree share pages by reference count.

    Paper: Kwon et al. 2023, PagedAttention (arXiv 2309.06180).
    """

    def _exhausted(self, wanted: int) -> KilnError:
        return OutOfPages(wanted=wanted, free=self.num_free)
