"""The learning rate of each optimiser step."""

from __future__ import annotations

import math

from kiln_trainer.recipes.options import OptimizerOptions


def learning_rate(step: int, num_steps: int, options: OptimizerOptions) -> float:
    """Rate of step `step` (from 1): a linear warm-up, then constant or falling towards 0.

    The first step already learns, and so does the last: linear and cosine would reach 0 one
    step after the end.
    """
    num_warmup = math.ceil(options.warmup_ratio * num_steps)
    if step <= num_warmup:
        return options.learning_rate * step / num_warmup
    progress = (step - 1 - num_warmup) / max(1, num_steps - num_warmup)
    if options.schedule == "linear":
        return options.learning_rate * (1 - progress)
    if options.schedule == "cosine":
        return options.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return options.learning_rate
