"""A runner without a model: it follows every page and slot, and notices when one is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from kiln_engine.domain.plan import BatchPlan, DecodeRow, PrefillChunk, RowSampling, VerifyRow
from kiln_engine.domain.result import PackedTop, ReadoutResult, RowResult, StepResult, VerifyResult


class WrongPlan(AssertionError):
    """A plan names a page or a slot that does not hold what the sequence needs."""


@dataclass(slots=True)
class _Slot:
    """What a state slot stands for: a digest of the traces committed, and the ring after them."""

    num_tokens: int
    digest: int
    ring: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """A step that the simulated device has carried out; `wait` is where its tokens are read."""

    result: StepResult

    def draw(self) -> None:
        """Nothing is left: rules are not simulated."""

    def wait(self) -> StepResult:
        return self.result


class SimulatedRunner:
    """Draws pseudo tokens that depend on every earlier token, the adapters and the seed.

    A token that is computed with adapters leaves a trace of both. Instead of K and V a page keeps the
    traces written to it, instead of a state a slot keeps a digest of the traces it has seen. Before it draws, the runner compares what the pages say with what the
    state says; a page or checkpoint used for the wrong prefix raises WrongPlan. So a completion is a
    pure function of its request, however it was batched, cached or preempted: `expected_tokens`.
    """

    def __init__(self, *, vocab_size: int, page_tokens: int = 16) -> None:
        self._vocab_size = vocab_size
        self._page_tokens = page_tokens
        self._pages: dict[tuple[int, int], int] = {}
        self._slots: dict[int, _Slot] = {}
        # The token drawn last for each live slot, and the drafts made behind it.
        self._drawn: dict[int, int] = {}
        self._drafts: dict[int, tuple[int, ...]] = {}

    def launch(self, plan: BatchPlan) -> SimulatedStep:
        """Carry out a plan. Raises WrongPlan when it breaks the contract of domain/plan.py."""
        written: set[int] = set()
        rows = [self._decode(row, written) for row in plan.decode_rows]
        # Every chunk reads before any chunk writes, as rows of one batch do.
        starts = [self._read_start(chunk) for chunk in plan.prefill_chunks]
        for chunk, digest in zip(plan.prefill_chunks, starts, strict=True):
            result = self._prefill(chunk, digest, written)
            if result is not None:
                rows.append(result)
        readouts = [_read_out(chunk) for chunk in plan.prefill_chunks if chunk.readout is not None]
        verified = [self._verify(row, written) for row in plan.verify_rows]
        return SimulatedStep(StepResult(plan.step_id, tuple(rows), tuple(readouts), tuple(verified)))

    def _verify(self, row: VerifyRow, written: set[int]) -> VerifyResult:
        if row.live_slot != row.state_slot:
            self._claim(row.state_slot, written)
        self._claim(row.live_slot, written)
        slot = self._unfolded(row)
        digest = _digest_all(slot.digest, slot.ring)
        self._check_pages(row.page_ids, row.position, digest)
        made = self._drafts.get(row.state_slot, ()) if row.draft_token_ids is None else row.draft_token_ids
        drafts = made[: row.num_drafts]
        if not len(drafts) == row.num_drafts == len(row.samplings) - 1:
            raise WrongPlan(f"{row.num_drafts} drafts were planned, there are {len(drafts)}")
        drawn: list[RowResult] = []
        is_accepted = True
        for line, token in enumerate([row.token_id, *drafts]):
            trace = _trace(token, row.adapter_slots)
            self._write_trace(row.page_ids, row.position + line, trace)
            slot.ring.append(trace)
            is_accepted = is_accepted and (line == 0 or drawn[-1].token_id == token)
            if is_accepted:
                digest = hash((digest, trace))
                drawn.append(self._draw(row.sequence_id, row.live_slot, digest, row.samplings[line]))
        del slot.ring[len(slot.ring) - row.num_lines + len(drawn) :]
        if row.num_next_drafts:
            self._drafts[row.live_slot] = self._guesses(row, digest, drawn)
        return VerifyResult(row.sequence_id, tuple(drawn))

    def _guesses(self, row: VerifyRow, digest: int, drawn: list[RowResult]) -> tuple[int, ...]:
        """Drafts behind the token drawn last: the tokens that will come, every third one wrong."""
        last_line = row.position + len(drawn) + row.num_next_drafts
        if last_line > len(row.page_ids) * self._page_tokens:
            raise WrongPlan(f"row at {row.position} has no pages for {row.num_next_drafts} drafts ahead")
        guesses, token, index = [], drawn[-1].token_id, row.samplings[0].output_index + len(drawn)
        for _ in range(row.num_next_drafts):
            digest = hash((digest, _trace(token, row.adapter_slots)))
            token = _draw_token(digest, RowSampling(row.samplings[0].params, index), self._vocab_size)
            guesses.append((token + (digest % 3 == 0)) % self._vocab_size)
            index += 1
        return tuple(guesses)

    def _unfolded(self, row: VerifyRow) -> _Slot:
        """The row's live slot, with a full page folded."""
        read, ring = self._slots[row.state_read_slot], self._slots[row.state_slot].ring
        num_in_ring = row.position - read.num_tokens
        if num_in_ring != len(ring):
            raise WrongPlan(
                f"row at {row.position} reads a state of {read.num_tokens} and {len(ring)} ring tokens"
            )
        if (num_in_ring >= self._page_tokens) != (row.state_fold_slot is not None):
            raise WrongPlan(f"row at {row.position} folds at the wrong time")
        num_folded = self._page_tokens if row.state_fold_slot is not None else 0
        folded = _digest_all(read.digest, ring[:num_folded])
        slot = _Slot(read.num_tokens + num_folded, folded, ring[num_folded:])
        self._slots[row.live_slot] = slot
        return slot

    def _decode(self, row: DecodeRow, written: set[int]) -> RowResult:
        read = self._slots[row.state_read_slot]
        ring = self._slots[row.state_slot].ring
        if read.num_tokens + len(ring) != row.position:
            raise WrongPlan(
                f"row at {row.position} reads a state of {read.num_tokens} and {len(ring)} ring tokens"
            )
        self._check_pages(row.page_ids, row.position, _digest_all(read.digest, ring))
        token = self._drawn[row.state_slot] if row.token_id is None else row.token_id
        trace = _trace(token, row.adapter_slots)
        self._write_trace(row.page_ids, row.position, trace)
        ring.append(trace)
        digest = _digest_all(read.digest, ring)
        completes_page = (row.position + 1) % self._page_tokens == 0
        if completes_page != (row.state_commit_slot is not None):
            raise WrongPlan(f"row at {row.position} commits at the wrong time")
        if row.state_commit_slot is not None:
            self._write_slot(row.state_commit_slot, _Slot(row.position + 1, digest), written)
        else:
            self._claim(row.state_slot, written)
        slot = row.state_slot if row.state_commit_slot is None else row.state_commit_slot
        return self._draw(row.sequence_id, slot, digest, row.sampling)

    def _read_start(self, chunk: PrefillChunk) -> int:
        if chunk.start % self._page_tokens:
            raise WrongPlan(f"a chunk starts at {chunk.start}, inside a page")
        if chunk.state_read_slot is None:
            if chunk.start:
                raise WrongPlan(f"a chunk from {chunk.start} on reads no state")
            return 0
        slot = self._slots[chunk.state_read_slot]
        if slot.num_tokens != chunk.start:
            raise WrongPlan(f"a chunk from {chunk.start} on reads a state of {slot.num_tokens} tokens")
        self._check_pages(chunk.page_ids, chunk.start, slot.digest)
        return slot.digest

    def _prefill(self, chunk: PrefillChunk, digest: int, written: set[int]) -> RowResult | None:
        checkpoints = {checkpoint.num_tokens: checkpoint.slot for checkpoint in chunk.checkpoints}
        committed = _Slot(chunk.start, digest)
        for position, token in enumerate(chunk.token_ids, chunk.start):
            trace = _trace(token, chunk.adapter_slots)
            self._write_trace(chunk.page_ids, position, trace)
            digest = hash((digest, trace))
            committed.ring.append(trace)
            if (position + 1) % self._page_tokens == 0:
                committed = _Slot(position + 1, digest)
                if position + 1 in checkpoints:
                    slot = checkpoints.pop(position + 1)
                    self._write_slot(slot, _Slot(position + 1, digest), written)
        if checkpoints:
            raise WrongPlan(f"checkpoints at {sorted(checkpoints)} are no boundaries of the chunk")
        if committed.ring and chunk.sampling is None and chunk.readout is None:
            raise WrongPlan("a chunk that is not the last ends inside a page")
        self._write_slot(chunk.state_slot, committed, written)
        if chunk.sampling is None:
            return None
        return self._draw(chunk.sequence_id, chunk.state_slot, digest, chunk.sampling)

    def _write_trace(self, page_ids: tuple[int, ...], position: int, trace: int) -> None:
        page_index, offset = divmod(position, self._page_tokens)
        self._pages[page_ids[page_index], offset] = trace

    def _write_slot(self, slot: int, content: _Slot, written: set[int]) -> None:
        self._claim(slot, written)
        self._slots[slot] = content

    def _claim(self, slot: int, written: set[int]) -> None:
        if slot in written:
            raise WrongPlan(f"slot {slot} is written twice in one step")
        written.add(slot)

    def _check_pages(self, page_ids: tuple[int, ...], num_tokens: int, digest: int) -> None:
        pages = 0
        for position in range(num_tokens):
            page_index, offset = divmod(position, self._page_tokens)
            pages = hash((pages, self._pages[page_ids[page_index], offset]))
        if pages != digest:
            raise WrongPlan(f"pages and state disagree about the first {num_tokens} tokens")

    def _draw(self, sequence_id: int, slot: int, digest: int, sampling: RowSampling) -> RowResult:
        token = _draw_token(digest, sampling, self._vocab_size)
        self._drawn[slot] = token
        top = tuple((token, -1.0) for _ in range(sampling.params.num_top_logprobs))
        return RowResult(sequence_id, token, logprob=-1.0, sampled_logprob=-1.0, top_logprobs=top)


def _read_out(chunk: PrefillChunk) -> ReadoutResult:
    """Log-probabilities that name their tokens, so that a test sees one too many or too few."""
    readout = chunk.readout
    assert readout is not None
    targets = readout.target_ids
    return ReadoutResult(
        chunk.sequence_id,
        logprobs=tuple(-1.0 - target for target in targets),
        top=PackedTop.of(((target, -1.0),) * readout.num_top_logprobs for target in targets),
        embedding=(1.0, 0.0) if readout.wants_embedding else (),
    )


def expected_tokens(
    prompt: tuple[int, ...],
    adapter_slots: tuple[tuple[int, float], ...],
    samplings: list[RowSampling],
    vocab_size: int,
) -> list[int]:
    """The first `len(samplings)` tokens any run must draw for a prompt."""
    digest = _digest_all(0, [_trace(token, adapter_slots) for token in prompt])
    tokens = []
    for sampling in samplings:
        tokens.append(_draw_token(digest, sampling, vocab_size))
        digest = hash((digest, _trace(tokens[-1], adapter_slots)))
    return tokens


def _trace(token: int, adapter_slots: tuple[tuple[int, float], ...]) -> int:
    return hash((token, adapter_slots))


def _draw_token(digest: int, sampling: RowSampling, vocab_size: int) -> int:
    token = hash((digest, sampling.params.seed, sampling.output_index)) % vocab_size
    while token in sampling.banned_token_ids:
        token = (token + 1) % vocab_size
    return token


def _digest_all(digest: int, traces: list[int]) -> int:
    for trace in traces:
        digest = hash((digest, trace))
    return digest
