"""Keys and values of the layers with attention; the PagePool counts the pages."""

from __future__ import annotations

import torch

from kiln_nn.config import ModelConfig


def kv_page_bytes(
    config: ModelConfig, page_tokens: int, dtype: torch.dtype, *, num_mtp_layers: int = 0
) -> int:
    """Bytes of one page across all layers with attention, keys and values together."""
    num_layers = config.num_full_layers + num_mtp_layers
    return 2 * num_layers * page_tokens * config.num_kv_heads * config.head_dim * dtype.itemsize


class KvStore:
    """One tensor `[layers, 2, pages, page_tokens, kv heads, head width]`.

    Where a reference computes attention, a page holds finite numbers from the moment a sequence
    begins it (`begin_pages`): it reads whole pages and masks what lies behind the context, and a masked
    NaN is still a NaN. The kernels mask what they load.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        num_mtp_layers: int = 0,
    ) -> None:
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        num_layers = config.num_full_layers + num_mtp_layers
        self._cache = torch.zeros(
            (num_layers, 2, num_pages, page_tokens, config.num_kv_heads, config.head_dim),
            dtype=dtype,
            device=device,
        )
        self._layers = [(layer[0], layer[1]) for layer in self._cache]
        # Zero bytes are zero in every format; not every format can be filled.
        self._cache_bytes = self._cache.view(torch.uint8)

    @property
    def num_bytes(self) -> int:
        return self._cache.nbytes

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value cache of the index-th full-attention layer, each `[P, S, h, D]`.

        Behind the model's own come those of its multi-token-prediction layers.
        """
        return self._layers[index]

    def begin_pages(self, page_ids: torch.Tensor) -> None:
        """Forget what an earlier owner left in pages that are now filled token by token."""
        self._cache_bytes.index_fill_(2, page_ids, 0)
