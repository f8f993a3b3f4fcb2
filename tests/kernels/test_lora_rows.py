"""How a step's tokens are packed for the LoRA kernels, and what the public function refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.lora import AdapterUse, LoraRows, RowsShape, TokenGroup, lora_add_, pack_groups


def groups_of_random_mixture(seed: int, num_tokens: int, num_adapters: int) -> list[TokenGroup]:
    """Each token with any set of adapters, also none, in a random order."""
    draw = np.random.default_rng(seed)
    groups: dict[tuple[AdapterUse, ...], list[int]] = {}
    for token in draw.permutation(num_tokens).tolist():
        chosen = sorted(draw.permutation(num_adapters)[: draw.integers(num_adapters + 1)].tolist())
        uses = tuple(AdapterUse(index, 4 + index, float(draw.integers(1, 4))) for index in chosen)
        groups.setdefault(uses, []).append(token)
    return [TokenGroup(tokens, uses) for uses, tokens in groups.items()]


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 64, 150])
@pytest.mark.parametrize("num_adapters", [1, 3, 8])
def test_every_use_of_any_mixture_is_one_entry_of_one_tile(num_tokens: int, num_adapters: int):
    shape = RowsShape.for_any(num_tokens, num_adapters)
    groups = groups_of_random_mixture(num_tokens, num_tokens, num_adapters)
    wanted = {
        (token, use.table_index): (use.rank, use.scale) for group in groups for token in group.tokens for use in group.uses
    }  # fmt: skip
    rows = LoraRows.over(torch.from_numpy(pack_groups(groups, shape)), shape)
    found: dict[tuple[int, int], tuple[int, float]] = {}
    for tile, (first, end, first_adapter, first_rank) in enumerate(rows.tiles_B4.tolist()):
        tokens = rows.tokens_BM[tile].tolist()
        for entry in range(first, end):
            adapter, rank = int(rows.adapters_E[entry]), int(rows.ranks_E[entry])
            assert entry > first or (adapter, rank) == (first_adapter, first_rank)
            assert rows.entries_E2M[entry, 0].tolist() == tokens
            for token, scale in zip(tokens, rows.scales_EM[entry].tolist(), strict=True):
                if scale:
                    assert (token, adapter) not in found
                    found[token, adapter] = (rank, scale)
    assert found == wanted
    tokens = rows.tokens_BM[rows.tokens_BM >= 0].tolist()
    assert len(tokens) == len(set(tokens))


def test_tensors_that_do_not_fit_are_refused():
    rows = LoraRows.of([TokenGroup([0], (AdapterUse(0, 4, 1.0),))], 16)
    y, x, a, b = torch.zeros(2, 10), torch.zeros(2, 6), torch.zeros(3, 8, 6), torch.zeros(3, 4, 10)
    lora_add_(y, x, a, b, rows, (0, 4, 10))
    for bad in (
        (y, x[:1], a, b, rows, (0, 4, 10)),
        (y, x[:, :5], a, b, rows, (0, 4, 10)),
        (y, x, a, b[:2], rows, (0, 4, 10)),
        (y, x, a, b[..., :9], rows, (0, 4, 10)),
        (y, x, a, b, rows, (0, 10)),
        (y, x, a, b, rows, (0, 4, 9)),
    ):
        with pytest.raises(ShapeMismatch):
            lora_add_(*bad)
