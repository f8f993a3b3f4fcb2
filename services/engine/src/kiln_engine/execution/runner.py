"""Carries out plans with torch: the engine's only way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import torch

from kiln_engine.domain.plan import BatchPlan, RowSampling
from kiln_engine.domain.result import RowResult, StepResult
from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.host_allocator import keep_freed_memory
from kiln_engine.execution.memory_plan import MemoryPlan
from kiln_engine.execution.sampled_ids import SampledIds
from kiln_engine.execution.sampler import PendingDraws, Sampler
from kiln_engine.execution.step_graphs import PassParts, StepGraphs
from kiln_engine.model import KvStore, PagedModel, StateStore, StepLayout
from kiln_nn.blocks import Weights
from kiln_nn.config import ModelConfig

log = structlog.get_logger()


@dataclass(frozen=True)
class DrawnPart:
    """Sequences whose tokens are on their way to the host, in order."""

    sequence_ids: tuple[int, ...]
    draws: PendingDraws


class TorchStep:
    """A launched step."""

    def __init__(self, step_id: int, parts: Sequence[DrawnPart]) -> None:
        self._step_id = step_id
        self._parts = parts

    def wait(self) -> StepResult:
        """One row for each decode row and each chunk with sampling."""
        rows = [
            RowResult(sequence_id, draw.token_id, draw.logprob, draw.sampled_logprob, draw.top_logprobs)
            for part in self._parts
            for sequence_id, draw in zip(part.sequence_ids, part.draws.wait(), strict=True)
        ]
        return StepResult(self._step_id, tuple(rows))


class TorchRunner:
    """The model, its memory, its adapters and its sampler behind `launch`.

    Allocates what the memory plan says at once. `weights` are borrowed and never written. Called
    from the loop thread only; `adapters.stage` is the one exception. On a GPU everything goes into
    one stream, so steps take effect in the order of their launch; on a CPU `launch` does the work.

    A step's decode rows and its chunks each run as a captured graph where there is one that holds
    them; otherwise they go through the layers together, kernel by kernel.
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
            dtype=memory.kv_dtype or dtype,
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
        self._sampler = Sampler(memory.max_running, config.vocab_size, device)
        self._sampled_ids = SampledIds(memory.num_state_slots, device)
        self._graphs: StepGraphs | None = None

    @property
    def num_bytes(self) -> int:
        """Device bytes held beside the weights."""
        return self.kv.num_bytes + self.states.num_bytes + self.adapters.num_bytes

    def capture(self) -> None:
        """Capture the step's graphs, where the device and the model's shape allow it.

        Raises:
            KernelsUnavailable: they do not; the runner works without them.
        """
        if self.device.type != "cuda":
            return
        logits_RV = torch.empty(
            (self._sampler.max_rows, self.config.vocab_size), dtype=torch.float32, device=self.device
        )
        parts = PassParts(self.model, self.adapters, self._sampled_ids, self._sampler, logits_RV)
        self._graphs = StepGraphs(parts)

    @torch.inference_mode()
    def launch(self, plan: BatchPlan) -> TorchStep:
        """Start one step; on a GPU it returns as soon as the work is queued."""
        self.model.prepare(plan)
        rows = [(row.sequence_id, row.sampling) for row in plan.decode_rows]
        samples = [(c.sequence_id, c.sampling) for c in plan.prefill_chunks if c.sampling is not None]
        passes = self._graphs.passes_for(plan) if self._graphs else None
        if passes is None:
            return TorchStep(plan.step_id, [self._run_piecewise(plan, rows + samples)])
        parts = []
        if passes.decode is not None:
            parts.append(_drawn(rows, passes.decode.run(plan, [sampling for _, sampling in rows])))
        if passes.prefill is not None:
            parts.append(_drawn(samples, passes.prefill.run(plan, [sampling for _, sampling in samples])))
        return TorchStep(plan.step_id, parts)
