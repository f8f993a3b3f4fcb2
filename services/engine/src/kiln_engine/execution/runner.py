"""Carries out plans with torch: the engine's only way to the device."""

from __future__ import annotations

import torch

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.domain.result import RowResult, StepResult
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.host_allocator import keep_freed_memory
from kiln_engine.execution.memory_plan import MemoryPlan
from kiln_engine.execution.sampled_ids import SampledIds
from kiln_engine.execution.sampler import PendingDraws, sample
from kiln_engine.model import KvStore, PagedModel, StateStore
from kiln_nn.blocks import Weights
from kiln_nn.config import ModelConfig


class TorchStep:
    """A launched step whose tokens are on their way to the host."""

    def __init__(self, step_id: int, sequence_ids: list[int], draws: PendingDraws | None) -> None:
        self._step_id = step_id
        self._sequence_ids = sequence_ids
        self._draws = draws

    def wait(self) -> StepResult:
        """One row for each decode row and each chunk with sampling."""
        draws = self._draws.wait() if self._draws else []
        return StepResult(
            self._step_id,
            tuple(
                RowResult(
                    sequence_id=sequence_id,
                    token_id=draw.token_id,
                    logprob=draw.logprob,
                    sampled_logprob=draw.sampled_logprob,
                    top_logprobs=draw.top_logprobs,
                )
                for sequence_id, draw in zip(self._sequence_ids, draws, strict=True)
            ),
        )


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
            config, num_pages=memory.num_pages, page_tokens=memory.page_tokens, dtype=dtype, device=device
        )
        self.states = StateStore(
            config,
            num_slots=memory.num_state_slots,
            page_tokens=memory.page_tokens,
            dtype=dtype,
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
        linear = self.adapters.linear_for(plan, self.model.base_linear)
        layout = self.model.layout(plan)
        self._sampled_ids.feed_(plan, layout)
        logits_RV = self.model.forward(layout, linear)
        rows = [(row.sequence_id, row.sampling) for row in plan.decode_rows]
        rows += [(c.sequence_id, c.sampling) for c in plan.prefill_chunks if c.sampling is not None]
        draws = None
        if rows:
            draws = sample(logits_RV, [sampling for _, sampling in rows])
            self._sampled_ids.keep(layout, draws.token_ids_R)
        return TorchStep(plan.step_id, [sequence_id for sequence_id, _ in rows], draws)


def _place_of(weights: Weights) -> tuple[torch.device, torch.dtype]:
    """Device and number format of the model: those of its embedding."""
    embedding = weights["model.embed_tokens.weight"]
    return embedding.device, embedding.dtype
