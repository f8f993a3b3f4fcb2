"""Carries out plans with torch: the engine's only way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from kiln_engine.domain.plan import BatchPlan, RowSampling, VerifyRow
from kiln_engine.domain.result import RowResult, StepResult
from kiln_engine.domain.speculation import most_lines
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.captured_step import Draw, GraphParts
from kiln_engine.execution.drafting import Drafter
from kiln_engine.execution.host_allocator import keep_freed_memory
from kiln_engine.execution.memory_plan import MemoryPlan
from kiln_engine.execution.readouts import PendingReadouts, read_out
from kiln_engine.execution.sampled_ids import DraftIds, SampledIds
from kiln_engine.execution.sampler import PendingDraws, Sampler, sample
from kiln_engine.execution.step_graphs import PREFILL_CHUNKS, StepGraphs
from kiln_engine.execution.token_masks import compile_masks
from kiln_engine.execution.verifying import PendingVerify, accept, line_samplings, needs_drafts_on_host
from kiln_engine.execution.warm_up import warm_up
from kiln_engine.model import KvStore, Linears, PagedModel, PrefillCapacity, StateStore
from kiln_engine.model.carried_hidden import CarriedHidden
from kiln_engine.model.mtp_layer import MtpHidden, MtpLayer
from kiln_engine.model.prefill_layout import prefill_numbers
from kiln_engine.model.step_layout import join_layouts
from kiln_nn.blocks import Weights
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.quantised import QuantisedMatrix

_Rows = list[tuple[int, RowSampling]]
# Lengths between which the kernels of prompts change, and the attention tiles of such prompts.
_COMPILED_PROMPTS = (512, 2048)
_LONG_PROMPT_TILE_ROWS = 128


class TorchStep:
    """A launched step: for each of its parts the sequences, and their results on the way to the host."""

    def __init__(self, step_id: int) -> None:
        self._step_id = step_id
        self._drawn: list[tuple[_Rows, PendingDraws]] = []
        self._undrawn: list[tuple[_Rows, Draw]] = []
        self._readouts: list[PendingReadouts] = []
        self._verified: list[PendingVerify] = []
        self._ended: torch.cuda.Event | None = None

    def add(self, rows: _Rows, draw: Draw | None, *, is_late: bool = False) -> None:
        """Add a part, and draw its tokens unless that has to wait for `draw`."""
        if draw is None:
            return
        if is_late:
            self._undrawn.append((rows, draw))
        else:
            self._drawn.append((rows, draw()))

    def add_readouts(self, readouts: PendingReadouts) -> None:
        """Add what the step's chunks tell."""
        self._readouts.append(readouts)

    def add_verified(self, verified: PendingVerify) -> None:
        """Add what the step's verify rows have drawn."""
        self._verified.append(verified)

    def mark_end(self, device: torch.device) -> None:
        """Let `wait` wait for the device where no result would make it.

        What a step reads may be given away once it has been waited for: pages, slots, adapters.
        """
        if device.type == "cuda" and not (self._drawn or self._undrawn or self._readouts or self._verified):
            self._ended = torch.cuda.Event(blocking=True)
            self._ended.record()

    @torch.inference_mode()
    def draw(self) -> None:
        """Draw what was left at launch."""
        self._drawn += [(rows, draw()) for rows, draw in self._undrawn]
        self._undrawn = []

    def wait(self) -> StepResult:
        """One row for each decode row and each chunk with sampling, what chunks told, and verify rows."""
        assert not self._undrawn
        if self._ended is not None:
            self._ended.synchronize()
        rows = [
            RowResult(sequence_id, draw.token_id, draw.logprob, draw.sampled_logprob, draw.top_logprobs)
            for drawn, pending in self._drawn
            for (sequence_id, _), draw in zip(drawn, pending.wait(), strict=True)
        ]
        readouts = [told for pending in self._readouts for told in pending.wait()]
        verified = [result for pending in self._verified for result in pending.wait()]
        return StepResult(self._step_id, tuple(rows), tuple(readouts), tuple(verified))


class TorchRunner:
    """The model, its memory, its adapters and its sampler behind `launch`.

    Allocates what the memory plan says at once. `weights` are borrowed and never written. Called
    from the loop thread only; `adapters.stage` is the one exception. On a GPU everything goes into
    one stream, so steps take effect in the order of their launch; on a CPU `launch` does the work.

    After `capture` a step's decode rows and its chunks each run as a graph where one holds them;
    otherwise they go through the layers together, kernel by kernel. If it is batch-invariant, what a
    sequence gets has the same bits in any company: from kernels that are cut alike for every batch, or,
    on a CPU, because every sequence goes through the layers on its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        memory: MemoryPlan,
        *,
        small_head: QuantisedMatrix | None = None,
        is_batch_invariant: bool = False,
        mtp_hidden: MtpHidden = "normed",
        draft_vocab_tokens: int | None = None,
    ) -> None:
        device, dtype = _place_of(weights)
        if device.type == "cpu":
            keep_freed_memory()
        self.config = config
        self.device = device
        self.kv = KvStore(
            config,
            num_pages=memory.num_pages,
            page_tokens=memory.page_tokens,
            dtype=memory.kv_dtype,
            device=device,
            num_mtp_layers=int(memory.drafts_by_mtp),
        )
        self.states = StateStore(
            config,
            num_slots=memory.num_state_slots,
            page_tokens=memory.page_tokens,
            dtype=dtype,
            state_dtype=memory.state_dtype,
            max_draft_tokens=memory.max_draft_tokens,
            device=device,
        )
        self.adapters = AdapterStore(
            config,
            num_slots=memory.num_adapter_slots,
            max_rank=memory.max_adapter_rank,
            dtype=dtype,
            device=device,
            with_mtp=memory.drafts_by_mtp,
            is_batch_invariant=is_batch_invariant,
        )
        self.model = PagedModel(
            config,
            weights,
            self.kv,
            self.states,
            memory.max_model_len,
            small_head_VD=small_head,
            is_batch_invariant=is_batch_invariant,
        )
        self._is_batch_invariant = is_batch_invariant
        self._sampled_ids = SampledIds(memory.num_state_slots, device)
        self._draft_ids = DraftIds(memory.num_state_slots, memory.max_draft_tokens, device)
        self._draft_vocab_tokens = draft_vocab_tokens
        if memory.drafts_by_mtp:
            self.model.mtp = self._mtp_layer(memory, mtp_hidden)
        self._drafter = self._new_drafter()
        self._max_rows = memory.max_running
        self._max_draft_tokens = memory.max_draft_tokens
        self._dtype = dtype
        self._step_token_budget = memory.step_token_budget
        self._graphs: StepGraphs | None = None

    def _mtp_layer(self, memory: MemoryPlan, hidden: MtpHidden) -> MtpLayer:
        carried = CarriedHidden(
            memory.num_state_slots,
            memory.max_draft_tokens + 1,
            self.config.hidden_size,
            _place_of(self.model.weights)[1],
            self.device,
        )
        return MtpLayer(
            self.config,
            self.model.weights,
            self.kv.layer(self.config.num_full_layers),
            self.model.pages,
            carried,
            hidden=hidden,
        )

    def _new_drafter(self) -> Drafter | None:
        if self.model.mtp is None:
            return None
        matrices, num_tokens = self.model.matrices, self._draft_vocab_tokens
        return Drafter(self.model.mtp, matrices, self.adapters, self._draft_ids, num_tokens)

    @property
    def num_bytes(self) -> int:
        """Device bytes held beside the weights."""
        stores = (self.kv, self.states, self.adapters, self.model.pages)
        num_carried_bytes = 0 if self.model.mtp is None else self.model.mtp.carried.num_bytes
        return sum(store.num_bytes for store in stores) + num_carried_bytes

    def capture(self, num_compile_threads: int = 1) -> int:
        """Capture the steps that fit a CUDA graph, before the first `launch`; returns their bytes.

        Kernels that were never compiled on this machine are compiled by so many threads.

        Raises: whatever a kernel raises that cannot run on this device or shape.
        """
        reserved_bytes = torch.cuda.memory_reserved()
        warm_up(self._capture, partial(self._capture, is_rehearsal=True), num_compile_threads)
        return torch.cuda.memory_reserved() - reserved_bytes

    def _capture(self, *, is_rehearsal: bool = False) -> None:
        """Make and keep the graphs; as a rehearsal only launch what that launches, and keep nothing."""
        num_lines = most_lines(self._max_rows, self._max_draft_tokens)
        num_rows, vocab_size = max(num_lines, PREFILL_CHUNKS), self.config.vocab_size
        logits_RV = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=self.device)
        # An earlier attempt may have captured a part of its drafts.
        drafter = self._new_drafter()
        parts = GraphParts(
            self.model,
            self.adapters,
            Sampler(num_rows, vocab_size, self.device, is_batch_invariant=self._is_batch_invariant),
            self._sampled_ids,
            self._draft_ids,
            drafter,
            logits_RV,
            None if is_rehearsal else torch.cuda.graph_pool_handle(),
            is_rehearsal,
        )
        graphs = StepGraphs(parts, self._max_rows, self._max_draft_tokens)
        self._compile_long_prompts()
        compile_masks(logits_RV)
        if not is_rehearsal:
            self._graphs, self._drafter = graphs, drafter

    @torch.inference_mode()
    def _compile_long_prompts(self) -> None:
        """Run passes of nothing but padding, so that the first long prompt finds its kernels."""
        shape = self.model.shape
        # Float32 has no larger tiles than graphs use.
        if self._dtype is not torch.float32 and not shape.has_one_tile_size:
            shape = replace(shape, graph_tile_rows=_LONG_PROMPT_TILE_ROWS)
        # Longer passes than a step's have no room.
        for num_tokens in (length for length in _COMPILED_PROMPTS if length <= self._step_token_budget):
            numbers = prefill_numbers((), shape, PrefillCapacity(num_tokens, num_chunks=1))
            layout = numbers.layout(torch.from_numpy(numbers.flat).to(self.device))
            self.model.forward(join_layouts(None, layout))

    @torch.inference_mode()
    def launch(self, plan: BatchPlan) -> TorchStep:
        """Start one step; on a GPU it returns as soon as the work is queued.

        With late rows the pass is on its way and the step's `draw` completes it.
        """
        step = TorchStep(plan.step_id)
        self._launch(plan, step)
        step.mark_end(self.device)
        return step

    def _launch(self, plan: BatchPlan, step: TorchStep) -> None:
        if plan.verify_rows:
            # First: rows that are drawn late must come last.
            self._launch_verify(BatchPlan(plan.step_id, verify_rows=plan.verify_rows), step)
            plan = replace(plan, verify_rows=())
        if not plan.is_empty:
            self._launch_rows_and_chunks(plan, step)

    def _launch_verify(self, plan: BatchPlan, step: TorchStep) -> None:
        """The pass of the verify rows, their draws, and how many of their drafts stand."""
        graph = self._graphs.for_verify(plan) if self._graphs else None
        self.model.prepare(plan, has_clean_memory=graph is None)
        guessed = self._known_drafts(plan.verify_rows)
        if graph is not None:
            step.add_verified(graph.run(plan, guessed))
            return
        layout = self.model.layout(plan)
        verify = layout.verify
        assert verify is not None
        self._draft_ids.feed_lines_(verify.token_ids_RN, verify.delta.ring_slots_R)
        logits_TV = self.model.forward(layout, self._linears(plan))
        samplings = line_samplings(plan.verify_rows, guessed, verify.num_lines)
        draws = sample(logits_TV, samplings)
        drawn_RN = draws.token_ids_R.view(-1, verify.num_lines)
        accepted_R = accept(verify.token_ids_RN, drawn_RN, verify.num_new_R)
        step.add_verified(PendingVerify(plan.verify_rows, verify.num_lines, draws, accepted_R))
        if self._drafter is not None:
            drafts = self._drafter.of(len(plan.verify_rows))
            drafts.send(plan.verify_rows)
            drafts.begin(verify, drawn_RN, accepted_R)
            drafts.run(plan.verify_rows, self._linears(plan, num_lines=1))

    def _linears(self, plan: BatchPlan, num_lines: int = 0) -> Linears:
        """The linear layers with the adapters of the plan's tokens; `num_lines` of each verify row, or all."""
        rows = self.adapters.rows_for(plan, num_lines)
        return Linears(self.model.matrices, None if rows is None else self.adapters.of_step(rows))

    def _known_drafts(self, rows: Sequence[VerifyRow]) -> list[tuple[int, ...]]:
        """The rows' drafts as far as their draws need them on the host."""
        if not any(map(needs_drafts_on_host, rows)):
            return [row.draft_token_ids or () for row in rows]
        made = self._draft_ids.read([row.state_slot for row in rows])
        return [
            tuple(drafts[: row.num_drafts]) if row.draft_token_ids is None else row.draft_token_ids
            for row, drafts in zip(rows, made, strict=True)
        ]

    def _launch_rows_and_chunks(self, plan: BatchPlan, step: TorchStep) -> None:
        rows_graph = self._graphs.for_rows(plan) if self._graphs and plan.decode_rows else None
        chunks_graph = self._graphs.for_chunks(plan) if self._graphs and plan.prefill_chunks else None
        if self._is_batch_invariant and self.device.type == "cpu":
            for alone in plan.one_by_one():
                self._launch_kernels(alone, step)
            return
        if (plan.decode_rows and rows_graph is None) or (plan.prefill_chunks and chunks_graph is None):
            self._launch_kernels(plan, step)
            return
        self.model.prepare(plan, has_clean_memory=False)
        graphs = [(rows_graph, _rows_of(plan), plan.has_late_rows), (chunks_graph, _samples_of(plan), False)]
        # The logits of all graphs lie in one place: what is left undrawn must come last.
        for graph, drawn, is_late in sorted(graphs, key=lambda part: part[2]):
            if graph is not None:
                step.add(drawn, graph.run(plan, [sampling for _, sampling in drawn]), is_late=is_late)

    def _launch_kernels(self, plan: BatchPlan, step: TorchStep) -> None:
        """The whole pass, kernel by kernel, as a part of the step."""
        self.model.prepare(plan)
        layout = self.model.layout(plan)
        self._sampled_ids.feed_(layout)
        linears = self._linears(plan)
        rows = _rows_of(plan) + _samples_of(plan)
        if any(chunk.readout for chunk in plan.prefill_chunks):
            hidden_TD = self.model.hidden_states(layout, linears)
            # As many rows as the workspace has room for when tokens are drawn.
            step.add_readouts(read_out(plan, hidden_TD, linears.head, self._max_rows))
            logits_RV = self.model.logits(hidden_TD, layout, linears) if rows else None
        else:
            logits_RV = self.model.forward(layout, linears)
        if logits_RV is None or not rows:
            return

        def draw() -> PendingDraws:
            samplings = [sampling for _, sampling in rows]
            draws = sample(logits_RV, samplings, is_batch_invariant=self._is_batch_invariant)
            self._sampled_ids.keep_rows(layout.kept_slots, draws.token_ids_R)
            return draws

        step.add(rows, draw, is_late=plan.has_late_rows)


def _rows_of(plan: BatchPlan) -> _Rows:
    return [(row.sequence_id, row.sampling) for row in plan.decode_rows]


def _samples_of(plan: BatchPlan) -> _Rows:
    return [(chunk.sequence_id, chunk.sampling) for chunk in plan.prefill_chunks if chunk.sampling]


def _place_of(weights: Weights) -> tuple[torch.device, torch.dtype]:
    """Device and number format of the model: those of its embedding."""
    embedding = weights["model.embed_tokens.weight"]
    return embedding.device, embedding.dtype
