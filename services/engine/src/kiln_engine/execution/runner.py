"""Carries out plans with torch: the engine's only way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kiln_engine.domain.plan import BatchPlan, RowSampling
from kiln_engine.domain.result import RowResult, StepResult
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.host_allocator import keep_freed_memory
from kiln_engine.execution.memory_plan import MemoryPlan
from kiln_engine.execution.sampled_ids import SampledIds
from kiln_engine.execution.sampler import PendingDraws, sample
from kiln_engine.model import KvStore, Linears, PagedModel, StateStore
from kiln_nn.blocks import Weights
from kiln_nn.config import ModelConfig

_Rows = Sequence[tuple[int, RowSampling]]


class TorchStep:
    """A launched step: for each of its parts the sequences, and their tokens on the way to the host."""

    def __init__(self, step_id: int, parts: Sequence[tuple[_Rows, PendingDraws]]) -> None:
        self._step_id = step_id
        self._parts = parts

    def wait(self) -> StepResult:
        """One row for each decode row and each chunk with sampling."""
        rows = [
            RowResult(sequence_id, draw.token_id, draw.logprob, draw.sampled_logprob, draw.top_logprobs)
            for drawn, pending in self._parts
            for (sequence_id, _), draw in zip(drawn, pending.wait(), strict=True)
        ]
        return StepResult(self._step_id, tuple(rows))


class TorchRunner:
    """The model, its memory, its adapters and its sampler behind `launch`.

    Allocates what the memory plan says at once. `weights` are borrowed and never written. Called
    from the loop thread only; `adapters.stage` is the one exception. On a GPU everything goes into
    one stream, so steps take effect in the order of their launch; on a CPU `launch` does the work.
    """

    def __init__(self, config: ModelConfig, weights: Weights, memory: MemoryPlan) -> None:
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
            num_state_slots=memory.num_state_slots,
            max_model_len=memory.max_model_len,
        )
        self.states = StateStore(
            config,
            num_slots=memory.num_state_slots,
            page_tokens=memory.page_tokens,
            dtype=dtype,
            state_dtype=memory.state_dtype,
            device=device,
        )
        self.adapters = AdapterStore(
            config,
            num_slots=memory.num_adapter_slots,
            max_rank=memory.max_adapter_rank,
            dtype=dtype,
            device=device,
        )
        self.model = PagedModel(config, weights, self.kv, self.states)
        self._sampled_ids = SampledIds(memory.num_state_slots, device)

    @property
    def num_bytes(self) -> int:
        """Device bytes held beside the weights."""
        return self.kv.num_bytes + self.states.num_bytes + self.adapters.num_bytes

    @torch.inference_mode()
    def launch(self, plan: BatchPlan) -> TorchStep:
        """Start one step; on a GPU it returns as soon as the work is queued."""
        rows = [(row.sequence_id, row.sampling) for row in plan.decode_rows]
        rows += [(c.sequence_id, c.sampling) for c in plan.prefill_chunks if c.sampling is not None]
        self.model.prepare(plan)
        layout = self.model.layout(plan)
        self._sampled_ids.feed_(plan, layout)
        adapter_rows = self.adapters.rows_for(plan)
        add = None if adapter_rows is None else partial(self.adapters.add_, rows=adapter_rows)
        logits_RV = self.model.forward(layout, Linears(self.model.matrices, add))
        if not rows:
            return TorchStep(plan.step_id, [])
        draws = sample(logits_RV, [sampling for _, sampling in rows])
        self._sampled_ids.keep(layout, draws.token_ids_R)
        return TorchStep(plan.step_id, [(rows, draws)])


def _place_of(weights: Weights) -> tuple[torch.device, torch.dtype]:
    """Device and number format of the model: those of its embedding."""
    embedding = weights["model.embed_tokens.weight"]
    return embedding.device, embedding.dtype
