"""What prompts are asked about themselves: their tokens' log-probabilities, and embeddings.

The head is applied to some tokens at a time, so that the logits of a whole prompt never exist.

Legend: `T` tokens of the step, `N` targets, `E` embeddings, `D` hidden width, `V` vocabulary, `F` fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from kiln_engine.domain.plan import BatchPlan, PrefillChunk
from kiln_engine.domain.result import PackedTop, ReadoutResult
from kiln_engine.execution.host_copy import HostCopy
from kiln_engine.model import to_device

Head = Callable[[torch.Tensor], torch.Tensor]


class PendingReadouts:
    """What the chunks of a step told, on its way to the host.

    `targets_NF` holds a line for each target, chunk after chunk: its log-probability, then ids and
    log-probabilities of the most alternatives that any chunk wants. `embeddings_ED` are in order too.
    """

    def __init__(
        self, chunks: Sequence[PrefillChunk], targets_NF: torch.Tensor, embeddings_ED: torch.Tensor
    ) -> None:
        self._chunks = chunks
        self._targets = HostCopy(targets_NF)
        self._embeddings = HostCopy(embeddings_ED)

    def wait(self) -> tuple[ReadoutResult, ...]:
        """One result for each chunk that is read out."""
        lines_NF, embeddings = self._targets.tensor(), iter(self._embeddings.wait())
        results, begin = [], 0
        for chunk in self._chunks:
            assert chunk.readout is not None
            own_NF = lines_NF[begin : begin + len(chunk.readout.target_ids)]
            begin += len(chunk.readout.target_ids)
            results.append(
                ReadoutResult(
                    chunk.sequence_id,
                    logprobs=tuple(own_NF[:, 0].tolist()),
                    top=_packed_top(own_NF, chunk.readout.num_top_logprobs),
                    embedding=tuple(next(embeddings)) if chunk.readout.wants_embedding else (),
                )
            )
        return tuple(results)


def _packed_top(lines_NF: torch.Tensor, num_top: int) -> PackedTop:
    most = (lines_NF.shape[1] - 1) // 2
    ids, logprobs = lines_NF[:, 1 : 1 + num_top], lines_NF[:, 1 + most : 1 + most + num_top]
    return PackedTop(num_top, ids.to(torch.int32).numpy().tobytes(), logprobs.numpy().tobytes())


def read_out(plan: BatchPlan, hidden_TD: torch.Tensor, head: Head, most_rows: int) -> PendingReadouts:
    """Look up what the plan's chunks are asked, from all tokens' hidden states after the final norm.

    `head` gives float32 logits `[n, V]` of hidden states `[n, D]`; at most `most_rows` exist at once, and
    as much again for their exponentials.
    """
    lengths = [len(chunk.token_ids) for chunk in plan.prefill_chunks]
    ends = accumulate(lengths, initial=len(plan.decode_rows))
    placed = [
        (begin, chunk) for begin, chunk in zip(ends, plan.prefill_chunks, strict=False) if chunk.readout
    ]
    places: list[int] = []
    targets: list[int] = []
    last_places: list[int] = []
    for begin, chunk in placed:
        readout = chunk.readout
        assert readout is not None
        first = begin + readout.first
        places.extend(range(first, first + len(readout.target_ids)))
        targets.extend(readout.target_ids)
        if readout.wants_embedding:
            last_places.append(begin + len(chunk.token_ids) - 1)
    num_top = max((chunk.readout.num_top_logprobs for _, chunk in placed if chunk.readout), default=0)
    device = hidden_TD.device
    last_TD = hidden_TD.index_select(0, to_device(last_places, device, torch.long)).float()
    return PendingReadouts(
        [chunk for _, chunk in placed],
        _target_lines(
            hidden_TD,
            to_device(places, device, torch.long),
            to_device(targets, device, torch.long),
            num_top,
            head,
            at_once=most_rows,
        ),
        torch.nn.functional.normalize(last_TD, dim=-1),
    )


def _target_lines(
    hidden_TD: torch.Tensor,
    places_N: torch.Tensor,
    targets_N: torch.Tensor,
    num_top: int,
    head: Head,
    *,
    at_once: int,
) -> torch.Tensor:
    """A line for each target, float32 `[N, 1 + 2 * num_top]`; token ids below 2^24 are exact in it."""
    num_targets = places_N.shape[0]
    lines_NF = torch.empty(num_targets, 1 + 2 * num_top, device=hidden_TD.device)
    for begin in range(0, num_targets, at_once):
        part = slice(begin, begin + at_once)
        logits_NV = head(hidden_TD.index_select(0, places_N[part]))
        total_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
        lines_NF[part, :1] = logits_NV.gather(1, targets_N[part, None]) - total_N1
        if num_top:
            values, ids = logits_NV.topk(num_top, dim=-1)
            lines_NF[part, 1 : 1 + num_top] = ids.float()
            lines_NF[part, 1 + num_top :] = values - total_N1
    return lines_NF
