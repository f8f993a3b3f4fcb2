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
def test_every_use_of_any_mixture_stands_in_one_layer_and_one_entry(num_tokens: int, num_adapters: int):
    shape = RowsShape.for_any(num_tokens, num_adapters)
    groups = groups_of_random_mixture(num_tokens, num_tokens, num_adapters)
    wanted = {
        (token, use.table_index): (use.rank, use.scale) for group in groups for token in group.tokens for use in group.uses
    }  # fmt: skip
    rows = LoraRows.over(torch.from_numpy(pack_groups(groups, shape)), shape)
    in_layers: dict[tuple[int, int], tuple[int, float]] = {}
    token_at: dict[tuple[int, int], int] = {}
    for tile, (first_layer, end_layer, first_member, _, num_blocks) in enumerate(rows.tiles_B5.tolist()):
        for layer in range(first_layer, end_layer):
            scales = rows.layers_L2M[layer, 1].view(torch.float32).tolist()
            for place, member in enumerate(rows.layers_L2M[layer, 0].tolist()):
                token = int(rows.tokens_BM[tile, place])
                token_at[layer, place] = token
                if member >= 0:
                    adapter, rank = (
                        rows.adapters_C[first_member + member],
                        rows.ranks_C[first_member + member],
                    )
                    assert rank <= 16 * num_blocks
                    assert (token, int(adapter)) not in in_layers
                    in_layers[token, int(adapter)] = (int(rank), scales[place])
    assert in_layers == wanted
    in_entries = []
    for adapter, rank, layer, start, *tokens in rows.entries_EW[: int(rows.counts[0])].tolist():
        for offset, token in enumerate(token for token in tokens if token >= 0):
            assert token_at[layer, start + offset] == token
            assert wanted[token, adapter][0] == rank
            in_entries.append((token, adapter))
    assert sorted(in_entries) == sorted(wanted)
    tokens = rows.tokens_BM[rows.tokens_BM >= 0].tolist()
    assert len(tokens) == len(set(tokens))


def test_tensors_that_do_not_fit_are_refused():
    rows = LoraRows.of([TokenGroup([0], (AdapterUse(0, 4, 1.0),))])
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
