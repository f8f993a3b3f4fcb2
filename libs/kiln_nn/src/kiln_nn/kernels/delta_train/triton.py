"""The gated delta rule for training in Triton: four launches forward, four backward.

Source: `reference.py`, which writes out the algebra (Yang et al. 2024, arXiv 2406.06484 and
2412.06464). Supported: K and V of 64 or 128, any number of value heads per key head, q, k and v alike
in float32 or bfloat16, g and beta in float32. Everything else takes
`gated_delta_chunked`. With float32 inputs all products are float32 (sums of three tf32 ones); with
bfloat16 ones the operands of products are bfloat16, sums and the carried state float32.

Forward keeps for the backward pass, at the 4B shape in bf16, 28 KB a token and layer: the states before
each tile of 64 tokens, the corrected values and the inverses.

Error of outputs and gradients against a float64 recurrence: below 2e-6 in float32 under the interpreter,
on an H200 below 1e-6 in float32 and 4.2e-3 in bfloat16, for every pair of these widths. Smaller ones
are right under the interpreter, but Triton 3.6 compiles them wrongly for Hopper: at 64 x 32 and 16 x 32
results were off by 1.2 or not a number, and eight warps in float32 at 16 x 32 read shared memory out of
bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from kiln_nn.kernels.delta_prefill.chunks import TILE_TOKENS
from kiln_nn.kernels.delta_prefill.triton_tiles import delta_inverses_kernel
from kiln_nn.kernels.delta_train.triton_backward import (
    corrected_grads_kernel,
    key_grads_kernel,
    query_grads_kernel,
    state_grads_kernel,
)
from kiln_nn.kernels.delta_train.triton_forward import (
    train_keys_kernel,
    train_outputs_kernel,
    train_pass_kernel,
)
from kiln_nn.kernels.dispatch import device_limits, is_interpreted


@dataclass(frozen=True)
class TrainConfig:
    """How the programs compute; `form` is "bf16" or the precision of a float32 product."""

    form: str
    keys_warps: int
    outputs_warps: int
    # Value columns of a state that one program of a pass carries.
    pass_block_v: int
    pass_warps: int
    pass_stages: int
    # Of the backward pass, which holds twice as many operands a tile.
    back_stages: int
    grads_block_v: int
    query_warps: int
    key_warps: int


_FLOAT32 = TrainConfig("tf32x3", 4, 4, 32, 4, 1, 1, 16, 4, 4)
# All that may ever be picked: by format, and whether a program may have 200 KB of shared memory.
CONFIGS = {
    (torch.bfloat16, True): TrainConfig("bf16", 4, 4, 64, 4, 3, 2, 64, 4, 8),
    (torch.bfloat16, False): TrainConfig("bf16", 4, 4, 64, 4, 1, 1, 32, 4, 8),
    (torch.float32, True): _FLOAT32,
    (torch.float32, False): _FLOAT32,
}


def config_for(dtype: torch.dtype, device: torch.device) -> TrainConfig:
    """The configuration for inputs of this format."""
    return CONFIGS[dtype, device_limits(device).shared_memory_bytes >= 200 * 1024]


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> bool:
    """Whether shapes and formats are within what the kernels were written for."""
    widths = (16, 32, 64, 128) if is_interpreted() else (64, 128)
    return (
        k.shape[2] in widths
        and v.shape[2] in widths
        and v.shape[1] % k.shape[1] == 0
        and v.shape[0] > 0
        and v.dtype in (torch.float32, torch.bfloat16)
        and q.dtype is k.dtype is v.dtype
        and g.dtype is beta.dtype is torch.float32
    )


class _Tiles(NamedTuple):
    """The tiles of packed documents as `find_tile` reads them, and how many the scratch must hold."""

    cu_seqlens_N1: torch.Tensor
    documents_B: torch.Tensor
    starts_B: torch.Tensor
    num_places: int

    def lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.cu_seqlens_N1, self.documents_B, self.starts_B


@lru_cache(maxsize=16)
def _tiles(bounds: tuple[int, ...], device: torch.device) -> _Tiles:
    places = [
        (document, start)
        for document, (first, end) in enumerate(pairwise(bounds))
        for start in range(0, end - first, TILE_TOKENS)
    ]
    documents, starts = torch.tensor(places, dtype=torch.int32).t().contiguous().to(device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    return _Tiles(cu_seqlens, documents, starts, bounds[-1] // TILE_TOKENS + len(bounds) - 1)


@dataclass(frozen=True)
class _Kept:
    """What the forward pass leaves for the backward one; by tile but for `corrected_THV`."""

    inverses: torch.Tensor  # [tiles, H, 64, 64]
    log_decays: torch.Tensor  # [tiles, H, 64] float32
    states: torch.Tensor  # [tiles, H, V, K]
    corrected_THV: torch.Tensor

    def all(self) -> tuple[torch.Tensor, ...]:
        return self.inverses, self.log_decays, self.states, self.corrected_THV


def _form(config: TrainConfig) -> str:
    return "ieee" if is_interpreted() else config.form  # the interpreter computes in float32


def _sizes(k: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    return {"H": v.shape[1], "HK": k.shape[1], "K": k.shape[2], "V": v.shape[2]}


def delta_forward(
    inputs: Sequence[torch.Tensor], bounds: tuple[int, ...], config: TrainConfig
) -> tuple[torch.Tensor, _Kept]:
    """Outputs `[T, H, V]` in the format of v, and what `delta_backward` needs."""
    q, k, v, g, beta = inputs
    sizes, form, tiles = _sizes(k, v), _form(config), _tiles(bounds, v.device)
    num_heads, key_dim, value_dim = sizes["H"], sizes["K"], sizes["V"]
    num_tiles = tiles.documents_B.shape[0]
    kept = _Kept(
        inverses=v.new_empty(tiles.num_places, num_heads, TILE_TOKENS, TILE_TOKENS),
        log_decays=g.new_empty(tiles.num_places, num_heads, TILE_TOKENS),
        states=v.new_empty(tiles.num_places, num_heads, value_dim, key_dim),
        corrected_THV=v.new_empty(v.shape),
    )
    keys = {name: sizes[name] for name in ("H", "HK", "K")}
    train_keys_kernel[(sizes["HK"], num_tiles)](
        k,
        g,
        beta,
        kept.inverses,
        kept.log_decays,
        *tiles.lists(),
        **keys,
        FORM=form,
        num_warps=config.keys_warps,
        num_stages=1,
    )
    delta_inverses_kernel[(num_heads, num_tiles)](
        kept.inverses, *tiles.lists(), H=num_heads, FORM=form, num_warps=1, num_stages=1
    )
    block_v = min(config.pass_block_v, value_dim)
    train_pass_kernel[(num_heads * value_dim // block_v, len(bounds) - 1)](
        k,
        v,
        beta,
        *kept.all(),
        tiles.cu_seqlens_N1,
        **sizes,
        BLOCK_V=block_v,
        STAGES=config.pass_stages,
        FORM=form,
        num_warps=config.pass_warps,
        num_stages=config.pass_stages,
    )
    out = v.new_empty(v.shape)
    train_outputs_kernel[(num_heads, num_tiles)](
        q,
        k,
        kept.corrected_THV,
        kept.log_decays,
        kept.states,
        out,
        *tiles.lists(),
        **sizes,
        FORM=form,
        num_warps=config.outputs_warps,
        num_stages=1,
    )
    return out, kept


def delta_backward(
    inputs: Sequence[torch.Tensor],
    bounds: tuple[int, ...],
    kept: _Kept,
    out_grad: torch.Tensor,
    config: TrainConfig,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, g and beta, each in the format of its input."""
    q, k, v, _, beta = inputs
    sizes, form, tiles = _sizes(k, v), _form(config), _tiles(bounds, v.device)
    num_tiles = tiles.documents_B.shape[0]
    grads = tuple(x.new_empty(x.shape) for x in inputs)
    right, state_grads = v.new_empty(v.shape), kept.states.new_empty(kept.states.shape)
    decay_grads = kept.log_decays.new_empty(kept.log_decays.shape)
    # The values' gradients are the last thing written: their memory holds another part until then.
    corrected_grad = grads[2]
    corrected_grads_kernel[(sizes["H"], num_tiles)](
        q,
        k,
        kept.log_decays,
        out_grad,
        corrected_grad,
        *tiles.lists(),
        **sizes,
        FORM=form,
        num_warps=config.outputs_warps,
        num_stages=1,
    )
    block_v = min(config.pass_block_v, sizes["V"])
    state_grads_kernel[(sizes["H"] * sizes["V"] // block_v, len(bounds) - 1)](
        q,
        k,
        beta,
        kept.inverses,
        kept.log_decays,
        out_grad,
        corrected_grad,
        state_grads,
        right,
        tiles.cu_seqlens_N1,
        **sizes,
        BLOCK_V=block_v,
        STAGES=config.back_stages,
        FORM=form,
        num_warps=config.pass_warps,
        num_stages=config.back_stages,
    )
    blocks = {"BLOCK_V": min(config.grads_block_v, sizes["V"]), "FORM": form, "num_stages": 1}
    shared = (kept.corrected_THV, kept.log_decays, kept.states, out_grad)
    query_grads_kernel[(sizes["HK"], num_tiles)](
        q, k, *shared, grads[0], decay_grads, *tiles.lists(), **sizes, **blocks, num_warps=config.query_warps
    )
    key_grads_kernel[(sizes["HK"], num_tiles)](
        q,
        k,
        v,
        beta,
        *shared,
        state_grads,
        right,
        decay_grads,
        *grads[1:],
        *tiles.lists(),
        **sizes,
        **blocks,
        num_warps=config.key_warps,
    )
    return grads


class _DeltaTrain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bounds: tuple[int, ...], *inputs: torch.Tensor) -> torch.Tensor:
        config = config_for(inputs[2].dtype, inputs[2].device)
        out, kept = delta_forward(inputs, bounds, config)
        ctx.save_for_backward(*inputs, *kept.all())
        ctx.bounds, ctx.config = bounds, config
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # checkpointing lets them be asked for once
        inputs, kept = saved[:5], _Kept(*saved[5:])
        return None, *delta_backward(inputs, ctx.bounds, kept, grads[0].contiguous(), ctx.config)


def delta_train(
    q_ThK: torch.Tensor,
    k_ThK: torch.Tensor,
    v_THV: torch.Tensor,
    g_TH: torch.Tensor,
    beta_TH: torch.Tensor,
    bounds: tuple[int, ...],
) -> torch.Tensor:
    """As the package's public function, for inputs that `supports` accepts."""
    inputs = (x.contiguous() for x in (q_ThK, k_ThK, v_THV, g_TH, beta_TH))
    return _DeltaTrain.apply(bounds, *inputs)  # type: ignore[no-any-return]
