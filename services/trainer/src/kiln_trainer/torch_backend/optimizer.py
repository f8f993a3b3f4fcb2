"""AdamW or Muon over the adapter's float32 parameters, with a state that a checkpoint can hold.

Papers: Loshchilov and Hutter 2019, Decoupled weight decay regularization (arXiv 1711.05101); Jordan et
al. 2024, Muon; Liu et al. 2025, Muon is scalable for LLM training (arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kiln_nn.lora.parameters import LoraParameters
from kiln_trainer.recipes.options import OptimizerKind, OptimizerOptions
from kiln_trainer.torch_backend.schedule import learning_rate

_MOMENTS: dict[OptimizerKind, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
}


class AdapterOptimizer:
    """torch's optimiser for one adapter: clips, sets the step's learning rate, steps, clears.

    `num_steps_done` is the number of updates applied so far.
    """

    def __init__(self, lora: LoraParameters, options: OptimizerOptions, num_steps: int) -> None:
        self.num_steps_done = 0
        self._options = options
        self._num_steps = num_steps
        self._parameters = dict(lora.named_parameters())
        # They have a loss of their own: what is learned must not depend on whether drafts follow it.
        self._of_mtp = lora.parameters_of_mtp()
        self._of_model = [
            p for p in self._parameters.values() if not any(p is other for other in self._of_mtp)
        ]
        self._moments = _MOMENTS[options.kind]
        self._optimizer = _torch_optimizer([*self._parameters.values()], options)

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to max_grad_norm together; returns their norm before that.

        Those of the multi-token-prediction layers are scaled apart, and are not in the norm.
        """
        limit = self._options.max_grad_norm or float("inf")
        if self._of_mtp:
            torch.nn.utils.clip_grad_norm_(self._of_mtp, limit, foreach=True)
        return torch.nn.utils.clip_grad_norm_(self._of_model, limit, foreach=True)

    def step(self) -> float:
        """Apply the gathered gradients and clear them; returns the learning rate used."""
        rate = learning_rate(self.num_steps_done + 1, self._num_steps, self._options)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        # torch does not count what its fused kernel writes, and copies of parameters go by that count.
        torch.autograd.graph.increment_version(self._parameters.values())
        self.clear()
        self.num_steps_done += 1
        return rate

    def clear(self) -> None:
        """Forget the gathered gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, torch.Tensor]:
        """The moments of every parameter as `<parameter>.<moment>`; zeros before the first step."""
        return {
            f"{name}.{moment}": self._optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
            for name, parameter in self._parameters.items()
            for moment in self._moments
        }

    def restore(self, moments: Mapping[str, torch.Tensor], num_steps_done: int) -> None:
        """Go on after `num_steps_done` updates that left `moments`."""
        for name, parameter in self._parameters.items():
            state = {
                moment: moments[f"{name}.{moment}"].to(parameter.device, copy=True)
                for moment in self._moments
            }
            if self._options.kind == "adamw":
                state["step"] = torch.tensor(float(num_steps_done), device=parameter.device)
            self._optimizer.state[parameter] = state
        self.num_steps_done = num_steps_done


def _torch_optimizer(
    parameters: list[torch.nn.Parameter], options: OptimizerOptions
) -> torch.optim.AdamW | torch.optim.Muon:
    rate, decay = options.learning_rate, options.weight_decay
    if options.kind == "muon":
        # An update has about the size of AdamW's, so that the same learning rates do.
        return torch.optim.Muon(parameters, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=decay,
        fused=True,  # one kernel for all parameters
    )
