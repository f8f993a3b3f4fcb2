"""Hand-made plans: a model on its stores, and sequences that are stepped without a scheduler.

The rig hands out pages and slots in shuffled order, so that nothing passes because ids happen
to be consecutive, and gives logits at every position instead of sampling.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kiln_engine.domain import (
    BatchPlan,
    DecodeRow,
    PrefillChunk,
    RowSampling,
    SamplingParams,
    StateCheckpoint,
    VerifyRow,
)
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.model import KvStore, Linears, PagedModel, StateStore
from kiln_engine.model.carried_hidden import CarriedHidden
from kiln_engine.model.mtp_layer import MtpHidden, MtpLayer
from kiln_nn.config import ModelConfig
from kiln_nn.weights.names import expected_tensors
from tests.support.tiny_models import read_tensors
from tests.support.variants import as_engine_holds_them

GREEDY = RowSampling(params=SamplingParams(temperature=0.0), output_index=0)
AdapterSlots = tuple[tuple[int, float], ...]


@dataclass
class HandSequence:
    """A sequence as the rig steps it. `read_slot` None means zeros: nothing was computed yet."""

    sequence_id: int
    state_slot: int
    adapter_slots: AdapterSlots = ()
    num_computed: int = 0
    # Tokens in the committed state.
    num_committed: int = 0
    page_ids: list[int] = field(default_factory=list)
    read_slot: int | None = None


class EngineRig:
    """A PagedModel with stores of its own and the ids to use them."""

    def __init__(
        self,
        folder: Path,
        *,
        page_tokens: int = 16,
        num_pages: int = 96,
        num_slots: int = 24,
        max_draft_tokens: int = 0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        mtp_hidden: MtpHidden | None = None,
    ) -> None:
        self.config = ModelConfig.from_folder(folder)
        self.page_tokens = page_tokens
        placed: dict[str, Any] = {"dtype": dtype, "device": torch.device(device)}
        common = {"page_tokens": page_tokens, **placed}
        num_mtp_layers = 0 if mtp_hidden is None else 1
        self.kv = KvStore(self.config, num_pages=num_pages, num_mtp_layers=num_mtp_layers, **common)
        self.states = StateStore(
            self.config, num_slots=num_slots, max_draft_tokens=max_draft_tokens, **common
        )
        specs = expected_tensors(self.config, include_mtp=True)
        self.weights = weights = {
            name: tensor.to(device, torch.float32 if specs[name].keeps_fp32 else dtype)
            for name, tensor in read_tensors(folder).items()
        }
        self.model = PagedModel(
            self.config,
            as_engine_holds_them(weights),
            self.kv,
            self.states,
            max_model_len=num_pages * page_tokens,
        )
        if mtp_hidden is not None:
            carried = CarriedHidden(num_slots, max_draft_tokens + 1, self.config.hidden_size, **placed)
            caches = self.kv.layer(self.config.num_full_layers)
            self.model.mtp = MtpLayer(
                self.config, weights, caches, self.model.pages, carried, hidden=mtp_hidden
            )
        self.adapters = AdapterStore(
            self.config, num_slots=4, max_rank=8, with_mtp=mtp_hidden is not None, **placed
        )
        shuffled = random.Random(0)
        self._pages = shuffled.sample(range(num_pages), num_pages)
        self._slots = shuffled.sample(range(num_slots), num_slots)
        self._next_id = 0

    def sequence(self, adapter_slots: AdapterSlots = ()) -> HandSequence:
        self._next_id += 1
        return HandSequence(self._next_id, self.take_slot(), adapter_slots)

    def take_slot(self) -> int:
        return self._slots.pop()

    def free(self, sequence: HandSequence) -> None:
        """Give pages and slot back, to be handed out next, with what they hold."""
        self._pages.extend(sequence.page_ids)
        self._slots.append(sequence.state_slot)

    def chunk(
        self,
        sequence: HandSequence,
        token_ids: Sequence[int],
        checkpoints: Sequence[StateCheckpoint] = (),
        sampling: RowSampling | None = GREEDY,
    ) -> PrefillChunk:
        """A prefill chunk of the sequence's next tokens; call once per step."""
        start = sequence.num_computed
        self.cover(sequence, start + len(token_ids))
        chunk = PrefillChunk(
            sequence_id=sequence.sequence_id,
            token_ids=tuple(token_ids),
            start=start,
            page_ids=tuple(sequence.page_ids),
            state_read_slot=sequence.read_slot,
            state_slot=sequence.state_slot,
            checkpoints=tuple(checkpoints),
            adapter_slots=sequence.adapter_slots,
            sampling=sampling,
        )
        sequence.num_computed += len(token_ids)
        sequence.num_committed = sequence.num_computed // self.page_tokens * self.page_tokens
        sequence.read_slot = sequence.state_slot
        return chunk

    def decode(
        self,
        sequence: HandSequence,
        token_id: int,
        commit_slot: int | None = None,
        sampling: RowSampling = GREEDY,
    ) -> DecodeRow:
        """One decode row; at the end of a page the state goes to `commit_slot` or its own slot."""
        position = sequence.num_computed
        self.cover(sequence, position + 1)
        assert sequence.read_slot is not None
        is_commit = (position + 1) % self.page_tokens == 0
        target = sequence.state_slot if commit_slot is None else commit_slot
        row = DecodeRow(
            sequence_id=sequence.sequence_id,
            token_id=token_id,
            position=position,
            page_ids=tuple(sequence.page_ids),
            state_read_slot=sequence.read_slot,
            state_slot=sequence.state_slot,
            state_commit_slot=target if is_commit else None,
            adapter_slots=sequence.adapter_slots,
            sampling=sampling,
        )
        sequence.num_computed += 1
        if is_commit:
            sequence.num_committed = sequence.num_computed
            sequence.read_slot = sequence.state_slot = target
        return row

    def verify(
        self,
        sequence: HandSequence,
        token_id: int,
        drafts: Sequence[int],
        *,
        num_accepted: int,
        sampling: RowSampling = GREEDY,
    ) -> VerifyRow:
        """A row of the next token and drafts, of which the caller says how many will stand.

        The state of full pages is folded as the scheduler would have it.
        """
        position = sequence.num_computed
        self.cover(sequence, position + 2 * len(drafts) + 2)
        assert sequence.read_slot is not None
        num_in_ring = position - sequence.num_committed
        if is_folded := num_in_ring >= self.page_tokens:
            sequence.num_committed += self.page_tokens
        sequence.num_computed += 1 + num_accepted
        return VerifyRow(
            sequence_id=sequence.sequence_id,
            token_id=token_id,
            draft_token_ids=tuple(drafts),
            num_drafts=len(drafts),
            position=position,
            page_ids=tuple(sequence.page_ids),
            state_read_slot=sequence.read_slot,
            state_slot=sequence.state_slot,
            state_fold_slot=sequence.state_slot if is_folded else None,
            adapter_slots=sequence.adapter_slots,
            samplings=(sampling,) * (1 + len(drafts)),
        )

    def step(self, rows: Sequence[DecodeRow] = (), chunks: Sequence[PrefillChunk] = ()) -> list[torch.Tensor]:
        """Run one step: logits of every token, one [tokens, vocabulary] per row, then per chunk."""
        plan = BatchPlan(0, tuple(rows), tuple(chunks))
        with torch.inference_mode():
            self.model.prepare(plan)
            every_token = dataclasses.replace(self.model.layout(plan), sample_tokens=None)
            adapter_rows = self.adapters.rows_for(plan)
            adapters = None if adapter_rows is None else self.adapters.of_step(adapter_rows)
            logits = self.model.forward(every_token, Linears(self.model.matrices, adapters)).cpu()
        return list(logits.split([1] * len(rows) + [len(chunk.token_ids) for chunk in chunks]))

    def prefill(self, sequence: HandSequence, token_ids: Sequence[int], splits: Sequence[int] = ()):
        """Logits of all tokens, chunk after chunk; `splits` are offsets into `token_ids`."""
        edges = [0, *splits, len(token_ids)]
        parts = [
            self.step(chunks=[self.chunk(sequence, token_ids[start:end])])[0]
            for start, end in itertools.pairwise(edges)
        ]
        return torch.cat(parts)

    def decode_all(self, sequence: HandSequence, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of the given tokens, fed one step each."""
        return torch.cat([self.step(rows=[self.decode(sequence, token)])[0] for token in token_ids])

    def cover(self, sequence: HandSequence, num_tokens: int) -> None:
        """Give the sequence pages for so many tokens."""
        while len(sequence.page_ids) * self.page_tokens < num_tokens:
            sequence.page_ids.append(self._pages.pop())


def token_ids(num_tokens: int, seed: int = 0, vocab_size: int = 300) -> list[int]:
    """Random token ids."""
    return [random.Random(seed * 7919 + i).randrange(vocab_size) for i in range(num_tokens)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of any position, relative to the length of its expected logits."""
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(error.max())
