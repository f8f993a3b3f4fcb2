"""Times decode steps of a demo-sized model on the CPU, by batch, and says where the time goes.

    OMP_NUM_THREADS=1 python benchmarks/cpu_decode.py [--batches 1 8 32] [--adapters 4] [--profile]

Random weights: the time of a step does not depend on their values. The scheduler is left out; the
runner is the one that serves.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from kiln_engine.domain import BatchPlan, DecodeRow, PrefillChunk, RowSampling, SamplingParams
from kiln_engine.execution.memory_plan import MemoryRequest, plan_memory
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.execution.sampler import sample
from kiln_engine.model.linears import Linears
from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, lora_shapes, serialize_adapter
from kiln_nn.weights.names import expected_tensors

PAGE_TOKENS = 16
CONTEXT_TOKENS = 1024


def demo_sized_config() -> ModelConfig:
    """The demo model's shape with eight layers."""
    return ModelConfig(
        vocab_size=2560,
        hidden_size=256,
        intermediate_size=768,
        num_layers=8,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=100_000.0,
        rotary_fraction=0.25,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        layer_types=(("linear_attention",) * 3 + ("full_attention",)) * 2,
    )


def make_runner(config: ModelConfig, max_running: int, num_adapters: int) -> TorchRunner:
    """A runner on random weights with that many random adapters of rank 8 resident."""
    torch.manual_seed(0)
    weights = {
        name: torch.randn(spec.shape) * (0.1 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5)
        for name, spec in expected_tensors(config, include_mtp=False).items()
    }
    request = MemoryRequest(
        page_tokens=PAGE_TOKENS,
        max_model_len=CONTEXT_TOKENS,
        max_running=max_running,
        step_token_budget=2048,
        num_adapter_slots=max(1, num_adapters),
        max_adapter_rank=8,
    )
    memory = plan_memory(config, request, torch.float32, free_bytes=2**33)
    runner = TorchRunner(config, weights, memory)
    spec = LoraSpec(rank=8, alpha=16)
    for slot in range(1, num_adapters + 1):
        tensors = {
            path: (torch.randn(8, inputs) * 0.01, torch.randn(outputs, 8) * 0.01)
            for path, (inputs, outputs) in lora_shapes(config, spec).items()
        }
        config_json, adapter_bytes = serialize_adapter(tensors, spec, "random")
        runner.adapters.stage(slot, adapter_bytes, config_json)
        runner.adapters.activate(slot)
    return runner


class Decoding:
    """A batch of sequences, prefilled and then stepped token by token."""

    def __init__(self, runner: TorchRunner, num_rows: int, num_prompt_tokens: int, num_adapters: int) -> None:
        self.runner = runner
        pages = CONTEXT_TOKENS // PAGE_TOKENS
        self._pages = [tuple(range(row * pages, (row + 1) * pages)) for row in range(num_rows)]
        self._adapters = [((1 + row % num_adapters, 1.0),) if num_adapters else () for row in range(num_rows)]
        # Prompts of different lengths, so that commits spread over the steps as they do in service.
        self._positions = [num_prompt_tokens + row for row in range(num_rows)]
        generator = torch.Generator().manual_seed(1)
        for row, length in enumerate(self._positions):
            tokens = torch.randint(2560, (length,), generator=generator).tolist()
            chunk = PrefillChunk(
                row, tuple(tokens), 0, self._pages[row], None, row, (), self._adapters[row], None
            )
            runner.launch(BatchPlan(0, prefill_chunks=(chunk,))).wait()
        self._tokens = [7] * num_rows

    def plan(self) -> BatchPlan:
        rows = tuple(
            DecodeRow(
                sequence_id=row,
                token_id=self._tokens[row],
                position=position,
                page_ids=self._pages[row][: position // PAGE_TOKENS + 1],
                state_read_slot=row,
                state_slot=row,
                state_commit_slot=row if (position + 1) % PAGE_TOKENS == 0 else None,
                adapter_slots=self._adapters[row],
                sampling=RowSampling(SamplingParams(temperature=1.0, seed=row), position),
            )
            for row, position in enumerate(self._positions)
        )
        return BatchPlan(1, rows)

    def step(self) -> float:
        """One step's milliseconds in the runner."""
        plan = self.plan()
        start = time.thread_time()
        result = self.runner.launch(plan).wait()
        elapsed = time.thread_time() - start
        self._tokens = [row.token_id for row in result.rows]
        self._positions = [position + 1 for position in self._positions]
        return 1000 * elapsed

    def parts(self) -> dict[str, float]:
        """Milliseconds of layout, forward pass and sampling, each the median of a few repeats."""
        plan, model = self.plan(), self.runner.model
        adapters = self.runner.adapters
        adapter_rows = adapters.rows_for(plan)
        used = None if adapter_rows is None else adapters.of_step(adapter_rows)
        linears = Linears(model.matrices, used)
        layout = model.layout(plan)
        with torch.inference_mode():
            logits = model.forward(layout, linears)
            rows = [row.sampling for row in plan.decode_rows]
            return {
                "layout": _median_ms(lambda: model.layout(plan)),
                "forward": _median_ms(lambda: model.forward(layout, linears)),
                "sample": _median_ms(lambda: sample(logits, rows).wait()),
            }


def _median_ms(call) -> float:
    times = []
    for _ in range(15):
        start = time.thread_time()
        call()
        times.append(1000 * (time.thread_time() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=0, help="adapters dealt over the rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print the costliest operators too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = demo_sized_config()
    print(f"hidden {config.hidden_size}, {config.num_layers} layers, float32, {options.threads} thread(s),")
    print(
        f"prompt {options.prompt_tokens} tokens, {options.adapters} adapters of rank 8; milliseconds a step"
    )
    print(
        f"{'batch':>5} {'best':>7} {'median':>7} {'p90':>7} {'tok/s':>7} {'layout':>7} {'forward':>8} {'sample':>7}"
    )
    for batch in options.batches:
        runner = make_runner(config, batch, options.adapters)
        decoding = Decoding(runner, batch, options.prompt_tokens, options.adapters)
        for _ in range(4):
            decoding.step()
        times = sorted(decoding.step() for _ in range(options.steps))
        median, p90 = statistics.median(times), times[int(0.9 * len(times))]
        parts = decoding.parts()
        print(
            f"{batch:>5} {times[0]:>7.2f} {median:>7.2f} {p90:>7.2f} {1000 * batch / statistics.mean(times):>7.0f}"
            f" {parts['layout']:>7.2f} {parts['forward']:>8.2f} {parts['sample']:>7.2f}"
        )
        if options.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(16):
                    decoding.step()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


if __name__ == "__main__":
    main()
