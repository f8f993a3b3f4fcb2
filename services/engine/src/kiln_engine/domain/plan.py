"""One step of the engine, frozen: what the scheduler decided and the runner carries out.

State slots. A slot of the StateStore holds the DeltaNet state committed at a page boundary, the
three pre-convolution rows before that boundary, and the ring of tokens since. A row names three
slots: it reads the committed state from `state_read_slot` (its own slot, or a shared checkpoint it
has not yet moved away from), keeps its ring in `state_slot` (the one live slot it owns), and, when
its token completes a page, commits the new state to `state_commit_slot`. After a commit the ring is
empty. The checkpoint a row reads from is never written.

Steps take effect in the order of their launch: a plan may name what an earlier one, still under way,
writes. The token a step draws for a row stays with the row's live slot (the one it commits to, if it
commits), so that a row planned before anybody has read that token can be fed from there.

Speculation. A verify row computes several tokens at once: lines. The first is the newest token, the
others are drafts, guesses of those after it. Each line draws the token after it exactly as a decode row
at its place would, with the same random number; a draft is accepted if it is the token that the line
before it drew. So the tokens are those of plain decoding, whatever was guessed. Rejected lines leave a
shorter ring, and keys and values that the next lines overwrite.

Paper: Leviathan, Kalman and Matias 2023, Speculative Decoding (arXiv 2211.17192); the coupling of
drafts and draws by one random number is that of Daliri, Musco and Suresh 2025 (arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kiln_engine.domain.output_rules import Constraint
from kiln_engine.domain.request import SamplingParams


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling of one row in one step."""

    params: SamplingParams
    # Index of the token to draw within the completion: with the seed it fixes the row's draw.
    output_index: int
    # Prompt and output tokens so far; empty unless params.needs_history.
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    # Ids that must not be drawn now (stop tokens before min_tokens).
    banned_token_ids: frozenset[int] = frozenset()
    # What the request's rules say about this draw, bans included; None where they say nothing.
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's next token: feed `token_id` at `position`, sample the one after it.

    A `token_id` of None is the one that the step before drew for `state_slot`.
    """

    sequence_id: int
    token_id: int | None
    # Tokens before this one; the ring holds position % page_tokens of them.
    position: int
    # Pages in order, covering positions 0..position.
    page_ids: tuple[int, ...]
    state_read_slot: int
    state_slot: int
    # Set exactly when this token completes a page.
    state_commit_slot: int | None
    # (adapter slot, scale) pairs; empty is the base model.
    adapter_slots: tuple[tuple[int, float], ...]
    sampling: RowSampling


@dataclass(frozen=True, slots=True)
class VerifyRow:
    """One sequence's newest token and drafts of those after it, one line each.

    Nothing is committed when a page is completed: the row's next step, which must be a verify row
    too, first folds the page from the ring (`state_fold_slot`). Until then the ring holds more than a
    page; its capacity is page_tokens and the longest draft.
    """

    sequence_id: int
    # The newest token: the first line.
    token_id: int
    # The drafts behind it. None: the step before made them for `state_slot`, and only the device has them.
    draft_token_ids: tuple[int, ...] | None
    num_drafts: int
    # Tokens before the first line.
    position: int
    # Pages in order, covering the lines and what drafting writes ahead of them.
    page_ids: tuple[int, ...]
    state_read_slot: int
    state_slot: int
    # Set exactly when the ring holds a page or more: the slot that the state at its end goes to, and
    # in which the row lives from then on.
    state_fold_slot: int | None
    adapter_slots: tuple[tuple[int, float], ...]
    # One for each line. Histories and constraints are those of the first: the drafts come on top.
    samplings: tuple[RowSampling, ...]
    # Drafts to make on the device for the row's next step, behind the token that this one draws last.
    num_next_drafts: int = 0

    @property
    def num_lines(self) -> int:
        return 1 + self.num_drafts

    @property
    def live_slot(self) -> int:
        """Where the row lives after the step; drafts and the last drawn token stay with it."""
        return self.state_slot if self.state_fold_slot is None else self.state_fold_slot


@dataclass(frozen=True, slots=True)
class StateCheckpoint:
    """Write the state after `num_tokens` tokens of the sequence (a page boundary) to `slot`.

    The slot is never the row's own `state_slot`.
    """

    num_tokens: int
    slot: int


@dataclass(frozen=True, slots=True)
class Readout:
    """What a chunk tells about its own tokens."""

    # The chunk's token at this index is the first whose successor is looked up.
    first: int
    # The successors of the tokens from there on: their log-probabilities are wanted.
    target_ids: tuple[int, ...]
    # Alternatives wanted with each.
    num_top_logprobs: int
    # Whether the hidden state of the chunk's last token is wanted.
    wants_embedding: bool


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A run of known tokens, from a page boundary on.

    The chunk ends at a page boundary, or, when it is the sequence's last, anywhere: then the tokens
    past the last boundary go into the ring of `state_slot`. The state at the last boundary within
    (or at the start of) the chunk is committed to `state_slot`.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    # Tokens before the chunk, a multiple of page_tokens.
    start: int
    # Pages in order, covering positions 0..start + len(token_ids) - 1.
    page_ids: tuple[int, ...]
    # Slot whose committed state is the one at `start`; None at the start of the sequence (zeros).
    state_read_slot: int | None
    state_slot: int
    # Extra copies of the state, ascending, at boundaries with start < num_tokens <= end of chunk.
    checkpoints: tuple[StateCheckpoint, ...]
    adapter_slots: tuple[tuple[int, float], ...]
    # Set when the chunk is the last of the prompt: sample the token after it. A prompt that is only
    # read out has none.
    sampling: RowSampling | None
    # Set in every chunk of a prompt that is read out.
    readout: Readout | None = None


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Everything one step does. Names only pages and slots that its sequences own or share."""

    step_id: int
    decode_rows: tuple[DecodeRow, ...] = ()
    prefill_chunks: tuple[PrefillChunk, ...] = ()
    verify_rows: tuple[VerifyRow, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.decode_rows and not self.prefill_chunks and not self.verify_rows

    def one_by_one(self) -> Iterator[BatchPlan]:
        """A plan for each sequence alone; together they do the same."""
        for row in self.decode_rows:
            yield BatchPlan(self.step_id, (row,))
        for chunk in self.prefill_chunks:
            yield BatchPlan(self.step_id, prefill_chunks=(chunk,))
        for verify in self.verify_rows:
            yield BatchPlan(self.step_id, verify_rows=(verify,))

    @property
    def num_verify_lines(self) -> int:
        """Lines of the longest verify row; 0 without any."""
        return max((row.num_lines for row in self.verify_rows), default=0)

    @property
    def has_late_rows(self) -> bool:
        """Whether a row's draw is constrained by a token that a step under way is drawing.

        Such a step is drawn once the steps before it have been committed.
        """
        return any(row.token_id is None and row.sampling.constraint is not None for row in self.decode_rows)

    @property
    def sequence_ids(self) -> tuple[int, ...]:
        """Whom the step works for, decode rows first."""
        rows = tuple(row.sequence_id for row in self.decode_rows)
        chunks = tuple(chunk.sequence_id for chunk in self.prefill_chunks)
        return rows + chunks + tuple(row.sequence_id for row in self.verify_rows)

    @property
    def num_tokens(self) -> int:
        num_lines = sum(row.num_lines for row in self.verify_rows)
        return len(self.decode_rows) + num_lines + sum(len(chunk.token_ids) for chunk in self.prefill_chunks)
