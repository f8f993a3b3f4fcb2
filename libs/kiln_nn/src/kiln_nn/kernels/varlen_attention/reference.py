"""Causal softmax attention inside each packed document, in plain torch.

Documents of similar length share one call of torch's fused attention, padded at their
ends: a causal mask already keeps every real token from seeing what comes after it, so the
padding needs no mask of its own and no token ever meets another document.

Legend: `T` tokens, `H` query heads, `h` kv heads (each serves H/h consecutive query
heads), `D` head width, `B` documents in a bucket, `L` their padded length.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F

_SHORTEST_IN_BUCKET = 0.75  # of the longest: bounds the padding


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training may reuse what serving cached
def _buckets(bounds: tuple[int, ...], device: torch.device) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Token indices `[B, L]` of each bucket, and for each token its place among all of them.

    Padding repeats a document's last token.
    """
    documents = [(end - start, start) for start, end in pairwise(bounds) if end > start]
    documents.sort(key=lambda document: (-document[0], document[1]))
    groups: list[list[tuple[int, int]]] = []
    for document in documents:
        if not groups or document[0] < _SHORTEST_IN_BUCKET * groups[-1][0][0]:
            groups.append([])
        groups[-1].append(document)
    place_of_token = torch.empty(bounds[-1], dtype=torch.long)
    buckets, num_places = [], 0
    for group in groups:
        lengths, starts = torch.tensor(group).unbind(1)
        offsets = torch.arange(group[0][0]).expand(len(group), -1)
        tokens = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
        is_token = offsets < lengths[:, None]
        place_of_token[tokens[is_token]] = num_places + is_token.flatten().nonzero()[:, 0]
        num_places += tokens.numel()
        buckets.append(tokens.to(device))
    return tuple(buckets), place_of_token.to(device)


def varlen_attention(
    q_THD: torch.Tensor, k_ThD: torch.Tensor, v_ThD: torch.Tensor, bounds: tuple[int, ...], scale: float
) -> torch.Tensor:
    """See the package's public function, which has checked the shapes."""
    if q_THD.shape[0] == 0:
        return torch.zeros_like(q_THD)
    buckets, place_of_token = _buckets(bounds, q_THD.device)
    outputs = []
    for tokens_BL in buckets:
        q, k, v = (
            x.index_select(0, tokens_BL.flatten()).unflatten(0, tokens_BL.shape).transpose(1, 2)
            for x in (q_THD, k_ThD, v_ThD)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, place_of_token)
