"""Changes to single logits before sampling: bias, banned tokens, penalties.

Few tokens of a row are touched, so the changes are a list with one entry per token and no tensor of
the vocabulary's size is made for them.
"""

from __future__ import annotations

import math
from collections import Counter

from kiln_engine.domain.plan import RowSampling


def changes_logits(sampling: RowSampling) -> bool:
    """Whether the row asks for any change here."""
    params = sampling.params
    return bool(sampling.banned_token_ids or params.logit_bias or params.needs_history)


def most_logit_edits(sampling: RowSampling) -> int:
    """What `logit_edits` returns at most, without looking at each token."""
    if not changes_logits(sampling):
        return 0
    history = len(sampling.prompt_token_ids) + len(sampling.output_token_ids)
    return len(sampling.params.logit_bias) + len(sampling.banned_token_ids) + history


def logit_edits(sampling: RowSampling) -> list[tuple[int, float, float, float]]:
    """(token, bias, penalty, addend) of each token that the row changes, ascending by token.

    In this order: bias; repetition, which divides positive and multiplies negative logits of tokens
    in prompt or output; presence and frequency, which subtract for tokens of the output, once and per
    occurrence; bans, which are an addend of -inf.
    """
    params = sampling.params
    addends: dict[int, float] = {}
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(sampling.output_token_ids).items():
            addends[token] = -params.presence_penalty - params.frequency_penalty * count
    addends.update(dict.fromkeys(sampling.banned_token_ids, -math.inf))
    penalised: set[int] = set()
    if params.repetition_penalty != 1.0:
        penalised = {*sampling.prompt_token_ids, *sampling.output_token_ids}
    return [
        (
            token,
            params.logit_bias.get(token, 0.0),
            params.repetition_penalty if token in penalised else 1.0,
            addends.get(token, 0.0),
        )
        for token in sorted({*params.logit_bias, *addends, *penalised})
    ]
