"""Keys and values of the full-attention layers; the PagePool counts the pages."""

from __future__ import annotations

import torch

from kiln_engine.model.store_shape import StoreShape
from kiln_nn.config import ModelConfig


def kv_page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one page across all full-attention layers, keys and values together."""
    return 2 * config.num_full_layers * page_tokens * config.num_kv_heads * config.head_dim * dtype.itemsize


def page_table_bytes(num_state_slots: int, max_model_len: int, page_tokens: int) -> int:
    """Bytes of the page table: a line for each state slot, and a spare one."""
    return (num_state_slots + 1) * -(-max_model_len // page_tokens) * torch.int32.itemsize


class KvStore:
    """One tensor `[layers, 2, pages, page_tokens, kv heads, head width]`, and the page table.

    A page holds finite numbers from the moment a sequence begins it where attention is a reference
    that reads whole pages and masks what lies behind the context (`begin_pages`): a masked NaN is
    still a NaN. The kernels mask what they load.

    The line of a live state slot names the pages of its sequence, in order. A prefill chunk writes
    all of its sequence's pages, a decode row the one that its token lies in.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        num_state_slots: int,
        max_model_len: int,
    ) -> None:
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        self.shape = StoreShape(page_tokens, -(-max_model_len // page_tokens), num_state_slots)
        self._cache = torch.zeros(
            (config.num_full_layers, 2, num_pages, page_tokens, config.num_kv_heads, config.head_dim),
            dtype=dtype,
            device=device,
        )
        self._layers = [(layer[0], layer[1]) for layer in self._cache]
        # Zero bytes are zero in every format; not every format can be filled.
        self._cache_bytes = self._cache.view(torch.uint8)
        self.page_table_SM = torch.zeros(
            (num_state_slots + 1, self.shape.num_line_pages), dtype=torch.int32, device=device
        )

    @property
    def num_bytes(self) -> int:
        return self._cache.nbytes + self.page_table_SM.nbytes

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value cache of the index-th full-attention layer, each `[P, S, h, D]`."""
        return self._layers[index]

    def write_lines(self, places: torch.Tensor, page_ids: torch.Tensor) -> None:
        """Put pages at places (`line * M + index`) of the page table."""
        self.page_table_SM.view(-1).index_copy_(0, places, page_ids.to(torch.int32))

    def move_lines(self, from_slots: torch.Tensor, to_slots: torch.Tensor) -> None:
        """Give the lines of sequences to the slots in which they go on."""
        self.page_table_SM.index_copy_(0, to_slots, self.page_table_SM.index_select(0, from_slots))

    def begin_pages(self, page_ids: torch.Tensor) -> None:
        """Forget what an earlier owner left in pages that are now filled token by token."""
        self._cache_bytes.index_fill_(2, page_ids, 0)
