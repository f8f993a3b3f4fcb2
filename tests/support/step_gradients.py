"""One training step's gradients of every LoRA tensor, in this process or in one of its own.

`python -m tests.support.step_gradients CASE_JSON FILE` writes them to a safetensors file. A process of
its own, because a kernel that fails on a GPU takes everything with it that comes after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import kiln_nn.packed_model as packed_model_module
from kiln_common.pb import trainer_pb2
from kiln_nn.kernels import dispatch
from kiln_nn.kernels.gated_delta import gated_delta_chunked, gated_delta_recurrent
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.packed_model import PackedModel
from kiln_trainer.data.documents import Document, PreparedJob
from kiln_trainer.data.packing import pack
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.recipes.opd import prepare_opd
from kiln_trainer.recipes.opd_options import DistillationObjective
from kiln_trainer.recipes.sft import prepare_sft
from kiln_trainer.torch_backend.policy import Policy
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import random_tensors, tiny_config
from tests.support.training import grpo_spec, rollout, sft_request
from tests.support.triton_kernels import INTERPRETED

RECIPES = ("sft", "grpo", "opd")
# Operations of a training step that have backward kernels of their own.
KERNELS = (
    *("delta_train_heads", "delta_train", "rms_norm", "swiglu", "qk_norm_rope"),
    *("varlen_attention", "logprobs"),
)
_REPOSITORY = Path(__file__).resolve().parents[2]
# Small, with widths that the kernels take.
_FIELDS = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ("linear_attention", "linear_attention", "full_attention", "linear_attention"),
}
# What the interpreter takes seconds for.
_SHORT_FIELDS = {
    "vocab_size": 300,
    "linear_value_head_dim": 16,
    "layer_types": ("linear_attention", "full_attention"),
}


@dataclass(frozen=True)
class StepCase:
    """A step on random documents; `kernels` are the operations whose kernels run.

    `dtype` is the base model's, whose values are those that `values` can hold; the adapter is float32
    (float64 in float64). `is_packed`: all documents in one micro-batch, not one in each.
    """

    recipe: str = "grpo"
    dtype: str = "float32"
    values: str = "float32"
    device: str = "cpu"
    is_packed: bool = True
    kernels: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (200, 3, 64, 131)
    is_short: bool = False


def gradients(case: StepCase) -> dict[str, torch.Tensor]:
    """Of every LoRA tensor, on the CPU, through the trainer's own step."""
    torch.set_num_threads(1)  # as the backend does; more of them wait for each other on a busy machine
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    config = tiny_config(**{**_FIELDS, **(_SHORT_FIELDS if case.is_short else {})})
    weights = {
        name: _in_format(tensor, dtype, getattr(torch, case.values)).to(device)
        for name, tensor in random_tensors(config).items()
    }
    lora = random_lora(config, rank=8, dtype=torch.promote_types(dtype, torch.float32))
    pairs = {path: (a.to(device), b.to(device)) for path, (a, b) in lora.tensors().items()}
    lora = LoraParameters(lora.spec, pairs)
    # All layers but the last are computed again in the backward pass.
    policy = Policy(PackedModel(config, weights, num_kept_layers=1), lora, device)
    job = _job(case, config.vocab_size)
    normaliser = sum(document.normaliser for document in job.documents)
    micro_batches = [job.documents] if case.is_packed else [(document,) for document in job.documents]
    for documents in micro_batches:
        batch = pack(documents, reference_logprobs=_reference(policy, documents)).to(device)
        forward_backward(policy, batch, job.objective, normaliser, StepSums(), is_first_step=True)
    return {name: parameter.grad.cpu() for name, parameter in lora.named_parameters()}


def exact_gradients(case: StepCase) -> dict[str, torch.Tensor]:
    """The same step in float64 on the CPU, where the DeltaNet rule is the plain one, token by token."""
    with _delta_rule(lambda *arguments: gated_delta_recurrent(*arguments)[0]):
        return gradients(replace(case, dtype="float64", device="cpu", kernels=()))


def rounded_gradients(case: StepCase) -> dict[str, torch.Tensor]:
    """The same step in plain torch, with what enters and leaves the DeltaNet rule in bfloat16.

    That is what kernels do; plain torch by itself keeps all of it in float32.
    """

    def rule(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, bounds: Any
    ) -> torch.Tensor:
        q, k, v = (x.bfloat16().float() for x in (q, k, v))
        return gated_delta_chunked(q, k, v, g, beta, tuple(bounds)).out_THV.bfloat16()

    with _delta_rule(rule):
        return gradients(case)


@contextmanager
def _delta_rule(rule: Callable[..., torch.Tensor]) -> Iterator[None]:
    own = packed_model_module.delta_train
    packed_model_module.delta_train = rule
    try:
        yield
    finally:
        packed_model_module.delta_train = own


def gradients_in_process(case: StepCase, folder: Path, **environment: str) -> dict[str, torch.Tensor]:
    """The same in a process of its own. Fails with its output, which names a kernel that failed."""
    file = folder / "gradients.safetensors"
    command = [sys.executable, "-m", "tests.support.step_gradients", json.dumps(asdict(case)), str(file)]
    # So that a failure comes from the launch that is named.
    env = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", **environment}
    done = subprocess.run(command, cwd=_REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return load_file(file)


def _job(case: StepCase, vocab_size: int) -> PreparedJob:
    generator = torch.Generator().manual_seed(21)
    texts = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in case.lengths]
    if case.recipe == "sft":
        return prepare_sft(sft_request(texts, num_prompt=1).sft)
    if case.recipe == "opd":
        drawn = [
            trainer_pb2.OpdRollout(prompt_token_ids=text[:1], completion_token_ids=text[1:]) for text in texts
        ]
        return prepare_opd(drawn, DistillationObjective())
    rollouts = [
        rollout(text[:1], text[1:], float(index % 2), temperature=0.7 + 0.3 * (index % 2))
        for index, text in enumerate(texts)
    ]
    return prepare_grpo(grpo_spec([rollouts], kl_coef=0.1))


def _in_format(tensor: torch.Tensor, dtype: torch.dtype, values: torch.dtype) -> torch.Tensor:
    """Vectors (norms, decays) stay float32, as in a checkpoint."""
    if tensor.dim() > 1:
        return tensor.to(values).to(dtype)
    return tensor.double() if dtype is torch.float64 else tensor


def _reference(policy: Policy, documents: tuple[Document, ...]) -> list[torch.Tensor]:
    """Log-probabilities of the base model, each document in its place."""
    every = range(len(documents))
    tokens = sum(document.num_tokens for document in documents)
    found = policy.logprobs_of(documents, every, batch_tokens=tokens, with_adapter=False)
    return [logprobs_s for _, logprobs_s in sorted(found)]


def _switch_on(kernels: tuple[str, ...]) -> set[str]:
    """Let these operations' backward kernels run, and no others; returns the set of those that are asked for.

    In the interpreter they run on the CPU.
    """
    dispatch.PROVEN_BACKWARD = frozenset(kernels)
    may_train_on_gpu = (lambda *_: True) if INTERPRETED else dispatch.may_train_on_gpu
    taken: set[str] = set()

    def choose(operation: str, *tensors: torch.Tensor) -> bool:
        is_taken = operation in kernels and may_train_on_gpu(operation, *tensors)
        taken.update([operation] * is_taken)
        return is_taken

    for operation in {*KERNELS} - {"delta_train_heads"}:  # which lies beside delta_train
        if not (INTERPRETED and operation == "varlen_attention"):  # torch's, and for GPUs only
            import_module(f"kiln_nn.kernels.{operation}").may_train_on_gpu = choose
    return taken


def main(case_json: str, file: str) -> None:
    case = StepCase(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(case_json).items()})
    taken = _switch_on(case.kernels)
    save_file({name: grad.contiguous() for name, grad in gradients(case).items()}, file)
    missing = {*case.kernels} - taken - ({"varlen_attention"} if INTERPRETED else set())
    assert not missing, f"nothing asked for the kernels of {missing}"


if __name__ == "__main__":
    main(*sys.argv[1:])
