"""Packed and paged attention against a softmax written out in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.paged_attention import (
    paged_decode_attention,
    paged_prefill_attention,
    reference,
    write_kv,
)
from kiln_nn.kernels.varlen_attention import varlen_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 6, 2, 8, 4
SCALE = HEAD_DIM**-0.5


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tokens(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _draw(num_tokens, HEADS, HEAD_DIM, seed=seed),
        _draw(num_tokens, KV_HEADS, HEAD_DIM, seed=seed + 1),
        _draw(num_tokens, KV_HEADS, HEAD_DIM, seed=seed + 2),
    )


def _direct(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one document, head by head and token by token."""
    out = torch.empty_like(q)
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        for t in range(q.shape[0]):
            scores = k[: t + 1, kv_head] @ q[t, head] * SCALE
            out[t, head] = torch.softmax(scores, 0) @ v[: t + 1, kv_head]
    return out


class _Pages:
    """Two caches whose pages are handed out in a shuffled order; unused places hold nonsense."""

    def __init__(self, num_pages: int) -> None:
        shape = (num_pages, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
        self.k, self.v = torch.full(shape, 7.0).double(), torch.full(shape, -9.0).double()
        self._free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(5)).tolist()

    def store(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write one sequence and return its page table."""
        num_tokens = k.shape[0]
        table = torch.tensor([self._free.pop() for _ in range(-(-num_tokens // PAGE_TOKENS))])
        places = torch.arange(num_tokens)
        slots = table[places // PAGE_TOKENS] * PAGE_TOKENS + places % PAGE_TOKENS
        write_kv(self.k, slots, k)
        write_kv(self.v, slots, v)
        return table


def test_packed_documents_do_not_see_each_other():
    q, k, v = _tokens(44)
    cu_seqlens = (0, 7, 7, 8, 19, 27, 34, 44)  # lengths 11, 10 and 8, 7, 7 share a call each
    out = varlen_attention(q, k, v, cu_seqlens, SCALE)
    for start, end in ((0, 7), (7, 8), (8, 19), (19, 27), (27, 34), (34, 44)):
        assert torch.allclose(out[start:end], _direct(q[start:end], k[start:end], v[start:end]))


def test_decode_reads_exactly_each_rows_context():
    pages, lengths = _Pages(16), (1, 4, 5, 13)
    sequences = [_tokens(length, seed=10 * length) for length in lengths]
    tables = [pages.store(k, v) for _, k, v in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
    q = torch.stack([sequence[0][-1] for sequence in sequences])
    out = paged_decode_attention(q, pages.k, pages.v, padded, torch.tensor(lengths), SCALE)
    for row, sequence in enumerate(sequences):
        assert torch.allclose(out[row], _direct(*sequence)[-1])


@pytest.mark.parametrize("most_scores", [1, 6 * 13 * 2, reference.MOST_SCORES])
def test_prefill_chunks_see_their_past_and_not_their_future(monkeypatch, most_scores):
    monkeypatch.setattr(reference, "MOST_SCORES", most_scores)
    pages, lengths, new = _Pages(16), (9, 6, 13), (4, 6, 0)
    sequences = [_tokens(length, seed=10 * length) for length in lengths]
    tables = [pages.store(k, v) for _, k, v in sequences]
    q = torch.cat([s[0][len(s[0]) - n :] for s, n in zip(sequences, new, strict=True)])
    out = paged_prefill_attention(q, pages.k, pages.v, tables, (0, 4, 10, 10), lengths, SCALE)
    expected = torch.cat([_direct(*s)[len(s[0]) - n :] for s, n in zip(sequences, new, strict=True)])
    assert torch.allclose(out, expected)


def test_a_long_prompt_keeps_no_scores_of_all_its_tokens(monkeypatch):
    """What is computed at once stays within the bound, whatever the prompt's length."""
    pages, (q, k, v) = _Pages(64), _tokens(200)
    table = pages.store(k, v)
    monkeypatch.setattr(reference, "MOST_SCORES", 6 * 200 * 8)
    attend, num_scores = reference._attend_to_past, []

    def counting(q_nHD: torch.Tensor, k_hCD: torch.Tensor, *rest: object) -> torch.Tensor:
        num_scores.append(q_nHD.shape[0] * HEADS * k_hCD.shape[1])
        return attend(q_nHD, k_hCD, *rest)

    monkeypatch.setattr(reference, "_attend_to_past", counting)
    out = paged_prefill_attention(q, pages.k, pages.v, [table], (0, 200), (200,), SCALE)
    assert torch.allclose(out, _direct(q, k, v))
    assert len(num_scores) == 25
    assert max(num_scores) <= reference.MOST_SCORES


def test_a_context_longer_than_its_pages_is_refused():
    pages = _Pages(4)
    q, k, v = _tokens(4)
    table = pages.store(k, v)
    with pytest.raises(ShapeMismatch, match="context"):
        paged_prefill_attention(q, pages.k, pages.v, [table], (0, 4), (5,), SCALE)
