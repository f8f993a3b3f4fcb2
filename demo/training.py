"""Trains the demo model: its shape, its first weights, the loss and the loop.

Legend: T tokens in a packed step, D hidden width.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from demo.data.corpus import PackedStep
from kiln_nn.config import LayerType, ModelConfig
from kiln_nn.kernels.logprobs import token_logprobs
from kiln_nn.packed_model import PackedModel
from kiln_nn.weights.names import EMBEDDING, TensorSpec, expected_tensors

MAX_HALF_LIFE_TOKENS = 4096
MTP_LOSS_WEIGHT = 0.3
_DT_BIAS = 1.0
_SOFTPLUS_OF_DT_BIAS = math.log1p(math.exp(_DT_BIAS))

_LAYER_TYPES: tuple[LayerType, ...] = (
    "linear_attention",
    "linear_attention",
    "linear_attention",
    "full_attention",
    "linear_attention",
    "linear_attention",
)

Parameters = dict[str, nn.Parameter]


def demo_config(vocab_size: int, eos_token_id: int, max_context_tokens: int) -> ModelConfig:
    """Six layers, few and wide, since a small model on a CPU pays by the operation."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_layers=6,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=100_000.0,
        rotary_fraction=0.25,
        max_position_embeddings=max_context_tokens,
        tie_word_embeddings=True,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        layer_types=_LAYER_TYPES,
        num_mtp_layers=1,
        eos_token_ids=(eos_token_id,),
    )


def initial_parameters(config: ModelConfig, seed: int, device: str) -> Parameters:
    """Float32 parameters under the checkpoint's own names; drawn on the CPU, the same on any device.

    Decays start with half-lives spread over 1 to 4,096 tokens, so that both short and long
    memory are there to be learned from.
    """
    generator = torch.Generator().manual_seed(seed)
    specs = expected_tensors(config, include_mtp=True)
    drawn = {name: _draw(name, spec, config, generator) for name, spec in specs.items()}
    return {name: nn.Parameter(tensor.to(device)) for name, tensor in drawn.items()}


def _draw(name: str, spec: TensorSpec, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    if name.endswith(".A_log"):
        half_lives = MAX_HALF_LIFE_TOKENS ** torch.rand(spec.shape, generator=generator)
        return torch.log(math.log(2) / (half_lives * _SOFTPLUS_OF_DT_BIAS))
    if name.endswith(".dt_bias"):
        return torch.full(spec.shape, _DT_BIAS)
    if name.endswith("linear_attn.norm.weight"):
        return torch.ones(spec.shape)
    if len(spec.shape) == 1:  # the other norms multiply by 1 + w
        return torch.zeros(spec.shape)
    noise = torch.randn(spec.shape, generator=generator)
    if name.endswith("conv1d.weight"):
        return 0.3 * noise
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
        return 0.02 / math.sqrt(2 * config.num_layers) * noise
    return 0.02 * noise


@dataclass(frozen=True)
class StepLoss:
    """`total` is what training lowers; the others are means over answer tokens, for reports."""

    total: torch.Tensor
    next_token: torch.Tensor
    mtp: torch.Tensor


def step_loss(model: PackedModel, head_VD: torch.Tensor, step: PackedStep) -> StepLoss:
    """Cross-entropy of the next token, plus that of the one after it from the MTP layer."""
    hidden = model.forward(step.token_ids_T, step.cu_seqlens)
    mtp_TD = model.mtp_hidden_states(hidden, step.token_ids_T, step.cu_seqlens)
    next_total, next_answer = _shifted_loss(hidden.after_norm_TD, head_VD, step, shift=1)
    mtp_total, mtp_answer = _shifted_loss(mtp_TD, head_VD, step, shift=2)
    return StepLoss(next_total + MTP_LOSS_WEIGHT * mtp_total, next_answer.detach(), mtp_answer.detach())


def _shifted_loss(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, step: PackedStep, shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean over all targets `shift` tokens ahead in their document, and over answers alone."""
    position = step.target_positions(shift)
    targets, weights = step.token_ids_T[position + shift], step.weight_T[position + shift]
    nll = -token_logprobs(hidden_TD[position], head_VD, targets).logprobs_T
    is_answer = (weights == 1).float()
    total = (nll * weights).sum() / weights.sum()
    return total, (nll * is_answer).sum() / is_answer.sum().clamp(min=1)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""

    num_steps: int
    peak: float = 2e-3
    warmup_share: float = 0.05

    def at(self, step: int) -> float:
        warmup = max(1, round(self.num_steps * self.warmup_share))
        if step < warmup:
            return self.peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return self.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    config: ModelConfig,
    parameters: Parameters,
    steps: Iterator[PackedStep],
    schedule: Schedule,
    report: Callable[[int, StepLoss, float], None],
) -> None:
    """Change `parameters` in place over `schedule.num_steps` steps of AdamW.

    `report` gets the step's number, its loss and the seconds since the start.
    """
    device = parameters[EMBEDDING].device
    decayed = [p for name, p in parameters.items() if p.ndim == 2 and name != EMBEDDING]
    kept = [p for name, p in parameters.items() if p.ndim != 2 or name == EMBEDDING]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.95), fused=device.type == "cuda")
    model = PackedModel(config, parameters)
    started = time.monotonic()
    for number in range(schedule.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(number)
        loss = step_loss(model, parameters[EMBEDDING], next(steps).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        report(number, loss, time.monotonic() - started)


@torch.no_grad()
def held_out_loss(
    config: ModelConfig, parameters: Mapping[str, torch.Tensor], steps: list[PackedStep]
) -> tuple[float, float]:
    """Mean answer loss of the next token and of the MTP layer, in nats a token."""
    model = PackedModel(config, parameters)
    device = parameters[EMBEDDING].device
    losses = [step_loss(model, parameters[EMBEDDING], step.to(device)) for step in steps]
    return (
        sum(loss.next_token.item() for loss in losses) / len(losses),
        sum(loss.mtp.item() for loss in losses) / len(losses),
    )
