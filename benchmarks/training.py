"""Times optimiser steps of LoRA training at Qwen3.5-4B's shape with random weights.

    python -m benchmarks.training [--workloads NAME …] [--mtp] [--profile] [--tiny]

A step is what the trainer does: pack the documents, forward and backward of the one micro-batch, clip,
AdamW; rank 16 on all linear layers. The first step compiles the kernels and is not counted. Rows go to
benchmarks/results/training.csv. MFU counts four operations per parameter and token (six without the
weights' own gradients) and attention's products forward and backward; the head counts for scored tokens
alone. What is computed twice to save memory is not counted. `--profile` prints where a step's GPU time
goes; `--mtp` adapts a multi-token-prediction layer as well, whose operations the MFU leaves out; `--tiny`
runs everything in small on a CPU, and keeps its rows out of there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.engine.results import ResultFile, device_name
from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, adapter_table
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_nn.weights.names import expected_tensors
from kiln_trainer.data.documents import Document
from kiln_trainer.data.packing import pack
from kiln_trainer.recipes.options import OptimizerOptions, PolicyObjective
from kiln_trainer.torch_backend.activation_memory import ActivationPlan
from kiln_trainer.torch_backend.optimizer import AdapterOptimizer
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from scripts.gpu.make_random_checkpoint import draw, shape_config

_COLUMNS = (
    *("commit", "gpu", "torch", "triton", "workload", "settings", "mean_ms", "best_ms", "tok_per_s"),
    *("mfu_fraction", "peak_added_gib", "kept_layers", "num_samples", "note"),
)
_RANK = 16
_PEAK_FLOPS = 788e12  # bf16 products measured on an H200
_OBJECTIVE = PolicyObjective(clip_low=0.2, clip_high=0.2, kl_coef=0.0)


@dataclass(frozen=True)
class Workload:
    """Documents of one length, of which the tokens behind the prompt are scored."""

    num_documents: int
    num_prompt: int
    num_scored: int
    objective: PolicyObjective | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_documents * (self.num_prompt + self.num_scored)

    def documents(self, vocab_size: int, seed: int = 0) -> list[Document]:
        generator = torch.Generator().manual_seed(seed)
        length, ones_s = self.num_prompt + self.num_scored, torch.ones(self.num_scored)
        is_policy = float(self.objective is not None)
        return [
            Document(
                token_ids_n=torch.randint(0, vocab_size, (length,), generator=generator),
                scored_s=torch.arange(self.num_prompt, length),
                ce_weight_s=(1 - is_policy) * ones_s,
                policy_weight_s=is_policy * ones_s / self.num_scored,
                advantage_s=(1.0 if number % 2 else -1.0) * ones_s,
                sampler_logprob_s=torch.full_like(ones_s, torch.nan),
                temperature=1.0,
                normaliser=1.0 if is_policy else float(self.num_scored),
            )
            for number in range(self.num_documents)
        ]


WORKLOADS = {
    "SFT 4 x 2048": Workload(4, 1, 2047),
    "GRPO 16 x (512 + 1024)": Workload(16, 512, 1024, _OBJECTIVE),
    "SFT 2 x 16384": Workload(2, 1, 16383),
}
_TINY = {
    "SFT 2 x 96": Workload(2, 1, 95),
    "GRPO 4 x (8 + 16)": Workload(4, 8, 16, _OBJECTIVE),
}


def model_flops(config: ModelConfig, workload: Workload) -> float:
    """Operations of a step that nothing could do without."""
    per_token = 4.0 * sum(inputs * outputs for inputs, outputs in adapter_table(config).values())
    head = 4.0 * config.vocab_size * config.hidden_size * workload.num_documents * workload.num_scored
    length = workload.num_prompt + workload.num_scored
    num_attention = sum(kind == "full_attention" for kind in config.layer_types)
    # Two products over half of all pairs forward, four of them backward.
    pairs = workload.num_documents * length**2 / 2
    attention = num_attention * 6 * 2.0 * pairs * config.num_attention_heads * config.head_dim
    return per_token * workload.num_tokens + head + attention


class Trainer:
    """A policy on random weights and one optimiser step after the other."""

    def __init__(self, config: ModelConfig, device: torch.device, *, trains_mtp: bool = False) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weights = {
            name: draw(name, spec, str(device)).to(torch.float32 if spec.keeps_fp32 else dtype)
            for name, spec in expected_tensors(config, include_mtp=trains_mtp).items()
        }
        self.weight_bytes = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self.config, self.device, self.trains_mtp = config, device, trains_mtp
        spec = LoraSpec(_RANK, 2.0 * _RANK, with_mtp=trains_mtp)
        lora = LoraParameters.create(config, spec, seed=0, device=device)
        model = PackedModel(config, weights)
        self.plan = ActivationPlan.measure(model, lora.linear_fn(weights), device)
        self._policy = Policy(model, lora, device, self.plan)
        self._optimizer = AdapterOptimizer(lora, OptimizerOptions(learning_rate=1e-4, max_grad_norm=1.0), 100)

    def step(self, documents: Sequence[Document], objective: PolicyObjective | None) -> dict[str, float]:
        """One optimiser step over one micro-batch; waits for the device as the trainer does."""
        sums = StepSums()
        normaliser = sum(document.normaliser for document in documents)
        batch = pack(documents).to(self.device)
        num_drafted = sum(document.num_drafted for document in documents) if self.trains_mtp else 0
        forward_backward(
            self._policy, batch, objective, normaliser, sums, is_first_step=True, num_drafted=num_drafted
        )
        metrics = sums.metrics() | {"grad_norm": float(self._optimizer.clip())}
        self._optimizer.step()
        return metrics


def measure(trainer: Trainer, name: str, workload: Workload, num_samples: int, results: ResultFile) -> None:
    """Time a workload's steps and add its row."""
    documents = workload.documents(trainer.config.vocab_size)
    is_cuda = trainer.device.type == "cuda"
    first_s = _seconds(lambda: trainer.step(documents, workload.objective))
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    samples_s = [
        _seconds(lambda: losses.append(trainer.step(documents, workload.objective)["loss"]))
        for _ in range(num_samples)
    ]
    mean_s = sum(samples_s) / len(samples_s)
    added = (torch.cuda.max_memory_allocated() - trainer.weight_bytes) / 2**30 if is_cuda else 0.0
    results.add(
        name,
        f"rank {_RANK}, {'bfloat16' if is_cuda else 'float32'}{', train_mtp' if trainer.trains_mtp else ''}",
        mean_ms=mean_s * 1e3,
        best_ms=min(samples_s) * 1e3,
        tok_per_s=workload.num_tokens / mean_s,
        mfu_fraction=model_flops(trainer.config, workload) / mean_s / _PEAK_FLOPS,
        peak_added_gib=f"{added:.2f}",
        kept_layers=trainer.plan.num_kept_layers(workload.num_tokens - workload.num_documents),
        num_samples=num_samples,
        note=f"the first one took {first_s:.1f} s; loss {losses[0]:.4f} to {losses[-1]:.4f}",
    )


def profile(trainer: Trainer, name: str, workload: Workload) -> None:
    """Print a step's GPU time by kernel and its CPU time by operation."""
    documents = workload.documents(trainer.config.vocab_size)
    trainer.step(documents, workload.objective)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        trainer.step(documents, workload.objective)
    key = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"
    print(f"== {name}")
    print(recorded.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=70))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def tiny_shape() -> dict[str, object]:
    """config.json of a model that a CPU trains in no time."""
    return shape_config("4b-short") | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "vocab_size": 301,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4b", help="a shape of scripts/gpu/make_random_checkpoint.py")
    parser.add_argument("--workloads", nargs="+", help="names or parts of names; all if left out")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--mtp", action="store_true", help="with train_mtp")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes instead")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    shape = tiny_shape() if options.tiny else shape_config(options.shape)
    config = ModelConfig.from_dict({**shape, "eos_token_id": 0, "mtp_num_hidden_layers": int(options.mtp)})
    trainer = Trainer(config, device, trains_mtp=options.mtp)
    if options.tiny:
        os.environ.setdefault("KILN_BENCH_RESULTS", tempfile.mkdtemp(prefix="kiln-bench-"))
    results = ResultFile("training", device_name() if device.type == "cuda" else "cpu", _COLUMNS)
    print(trainer.plan, flush=True)
    for name, workload in (_TINY if options.tiny else WORKLOADS).items():
        if options.workloads and not any(part in name for part in options.workloads):
            continue
        if options.profile:
            profile(trainer, name, workload)
        else:
            measure(trainer, name, workload, options.samples, results)


if __name__ == "__main__":
    main()
