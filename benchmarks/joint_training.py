"""Whether several jobs' adapters learn faster in one batch than one after the other.

    python -m benchmarks.joint_training [--jobs 2 4 8] [--tokens 512 2048 8192] [--shape 4b] [--tiny]

Each job has an adapter (rank 16, all linear layers), an AdamW and documents of its own. One after the
other is what the trainer does: a step of each job. Together, all documents are one packed micro-batch:
the base's products, attention, DeltaNet and head see all of it, and each adapter its own rows; then each
optimiser takes its step. Both give the same gradients, which is checked before anything is timed. Rows go
to benchmarks/results/joint_training.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from benchmarks.engine.results import ResultFile, device_name
from benchmarks.training import Workload, tiny_shape
from kiln_nn.blocks.linear import LinearFn
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.logprobs import token_logprobs
from kiln_nn.lora import LoraSpec
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_nn.weights.names import expected_tensors
from kiln_trainer.data.documents import Document
from kiln_trainer.data.packing import pack
from kiln_trainer.recipes.options import OptimizerOptions
from kiln_trainer.torch_backend.activation_memory import ActivationPlan
from kiln_trainer.torch_backend.optimizer import AdapterOptimizer
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from scripts.gpu.make_random_checkpoint import draw, shape_config

COLUMNS = (
    *("commit", "gpu", "torch", "triton", "workload", "settings"),
    *("apart_ms", "together_ms", "speedup", "num_samples", "note"),
)
_RANK = 16
# Of a tensor's gradient: sums of other shapes, in the base's format.
_MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class _JointLinear(torch.autograd.Function):
    """One frozen linear layer over all rows, and to each job's rows its own update `s B A x`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        bounds: Sequence[int],
        scale: float,
        x: torch.Tensor,
        *ab: torch.Tensor,
    ) -> torch.Tensor:
        copies = [tensor.to(x.dtype) for tensor in ab]
        y, hidden = x @ weight.t(), []
        for job, (start, end) in enumerate(pairwise(bounds)):
            a, b = copies[2 * job : 2 * job + 2]
            hidden.append(x[start:end] @ (scale * a).t())
            y[start:end].addmm_(hidden[-1], b.t())
        ctx.save_for_backward(x)
        ctx.rest = weight, bounds, scale, copies, hidden
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), (weight, bounds, scale, copies, hidden) = ctx.saved_tensors, ctx.rest
        x_grad, ab_grads = grad @ weight, []
        for job, (start, end) in enumerate(pairwise(bounds)):
            a, b = copies[2 * job : 2 * job + 2]
            h_grad = grad[start:end] @ b
            x_grad[start:end].addmm_(h_grad, scale * a)
            ab_grads += [
                (scale * h_grad.t() @ x[start:end]).float(),
                (grad[start:end].t() @ hidden[job]).float(),
            ]
        return None, None, None, x_grad, *ab_grads


class Jobs:
    """As many jobs as are asked for, on one base model."""

    def __init__(self, config: ModelConfig, device: torch.device, num_jobs: int, workload: Workload) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.weights = {
            name: draw(name, spec, str(device)).to(torch.float32 if spec.keeps_fp32 else dtype)
            for name, spec in expected_tensors(config, include_mtp=False).items()
        }
        self.device, self.dtype = device, dtype
        self.loras = [
            LoraParameters.create(config, LoraSpec(_RANK, 2.0 * _RANK), seed=seed, device=device)
            for seed in range(num_jobs)
        ]
        options = OptimizerOptions(learning_rate=1e-4, max_grad_norm=1.0)
        self.optimizers = [AdapterOptimizer(lora, options, num_steps=1000) for lora in self.loras]
        self.documents = [workload.documents(config.vocab_size, seed) for seed in range(num_jobs)]
        self._model = PackedModel(config, self.weights)
        self._plan = ActivationPlan.measure(self._model, self.loras[0].linear_fn(self.weights), device)
        self._policies = [Policy(self._model, lora, device, self._plan) for lora in self.loras]

    def learn_apart(self) -> None:
        """Gradients of every job, one after the other."""
        for policy, documents in zip(self._policies, self.documents, strict=True):
            batch = pack(documents).to(self.device)
            forward_backward(policy, batch, None, _normaliser(documents), StepSums(), is_first_step=True)

    def learn_together(self) -> None:
        """Gradients of every job from one pass over all documents."""
        everything = [document for documents in self.documents for document in documents]
        batch = pack(everything).to(self.device)
        ends = [sum(len(d) for d in self.documents[: job + 1]) for job in range(len(self.documents))]
        bounds = [0, *(batch.cu_seqlens[end] for end in ends)]
        self._model.num_kept_layers = self._plan.num_kept_layers(bounds[-1])
        hidden_TD = self._model.hidden_states(batch.token_ids_T, batch.cu_seqlens, self._joint(bounds))
        found = token_logprobs(hidden_TD[batch.rows_S], self._model.head_weight, batch.targets_S)
        shares = [1 / _normaliser(documents) for documents in self.documents for _ in documents]
        share_S = torch.tensor(shares, device=self.device)[batch.document_S]
        (-found.logprobs_T * batch.ce_weight_S * share_S).sum().backward()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.clip()
            optimizer.step()

    def take_gradients(self) -> list[torch.Tensor]:
        """What has been gathered, which is forgotten."""
        grads = [parameter.grad.clone() for lora in self.loras for parameter in lora.parameters()]
        for optimizer in self.optimizers:
            optimizer.clear()
        return grads

    def _joint(self, bounds: Sequence[int]) -> LinearFn:
        parameters = [dict(lora.named_parameters()) for lora in self.loras]
        scale = self.loras[0].spec.scaling

        def linear(module_paths: Sequence[str], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = []
            for path in module_paths:
                ab = [own[f"{path}.{side}"] for own in parameters for side in ("lora_A", "lora_B")]
                outputs.append(_JointLinear.apply(self.weights[path + ".weight"], bounds, scale, x, *ab))
            return tuple(outputs)

        return linear


def _normaliser(documents: Sequence[Document]) -> float:
    return sum(document.normaliser for document in documents)


def largest_error(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Relative error of the tensor that is furthest off. B is zero at first, so A's gradients are."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(left, right, strict=True) if b.norm() > 0)


def seconds(run: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def measure(jobs: Jobs, tokens: int, num_samples: int, results: ResultFile) -> None:
    """Check that both ways give the same gradients, time them in turn, add the row."""
    for _ in range(2):  # the second with adapters that do something
        jobs.learn_apart()
        apart = jobs.take_gradients()
        jobs.learn_together()
        together = jobs.take_gradients()
        error = largest_error(together, apart)
        assert error < _MOST_ERROR[jobs.dtype], f"the gradients differ by {error:.1e}"
        jobs.learn_apart()
        jobs.step()
    samples: dict[str, list[float]] = {"apart": [], "together": []}
    for _ in range(num_samples):
        for name, learn in (("apart", jobs.learn_apart), ("together", jobs.learn_together)):
            samples[name].append(seconds(lambda learn=learn: (learn(), jobs.step())))
    apart_s, together_s = (statistics.median(samples[name]) for name in ("apart", "together"))
    results.add(
        f"{len(jobs.loras)} jobs of {tokens} tokens",
        f"rank {_RANK}, {str(jobs.dtype).removeprefix('torch.')}",
        apart_ms=1e3 * apart_s,
        together_ms=1e3 * together_s,
        speedup=f"{apart_s / together_s:.2f}",
        num_samples=num_samples,
        note=f"gradients within {error:.1e}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="of a job's step")
    parser.add_argument("--shape", default="4b", help="a shape of scripts/gpu/make_random_checkpoint.py")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    config = ModelConfig.from_dict(
        {**(tiny_shape() if options.tiny else shape_config(options.shape)), "eos_token_id": 0}
    )
    if options.tiny:
        os.environ.setdefault("KILN_BENCH_RESULTS", tempfile.mkdtemp(prefix="kiln-bench-"))
        options.jobs, options.tokens = [3], [64]
    results = ResultFile("joint_training", device_name() if device.type == "cuda" else "cpu", COLUMNS)
    for num_jobs in options.jobs:
        for tokens in options.tokens:
            jobs = Jobs(config, device, num_jobs, Workload(4, 1, tokens // 4 - 1))
            measure(jobs, tokens, options.samples, results)


if __name__ == "__main__":
    main()
