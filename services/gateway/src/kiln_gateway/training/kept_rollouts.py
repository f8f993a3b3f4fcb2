"""Finds the kept rollout behind a completion's id or its text, and says whether it can be trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kiln_common.pb import trainer_pb2
from kiln_gateway.errors import OffPolicyRollout, RolloutNotFound
from kiln_gateway.rollouts import Rollout, RolloutStore, match_key


class KeptRollouts:
    """The rollouts of one caller, for one training request.

    A rollout found by its text is used once: eight equal completions are eight rollouts.
    """

    def __init__(self, store: RolloutStore, owner: str, model_hash: str) -> None:
        self._store = store
        self._owner = owner
        self._model_hash = model_hash
        self._matches: dict[str, list[Rollout]] = {}

    async def by_id(self, completion_id: str, index: int) -> Rollout:
        """Raises RolloutNotFound, QueueUnavailable."""
        found = await self._store.find(completion_id, index, self._owner)
        if found is None or found.model_hash != self._model_hash:
            raise RolloutNotFound(
                f"there is no rollout {completion_id!r} with index {index}", param="completion_id"
            )
        return found

    async def by_text(
        self,
        messages: Sequence[dict[str, Any]],
        text: str,
        is_wanted: Callable[[Rollout], bool] = lambda rollout: True,
    ) -> Rollout | None:
        """The newest wanted rollout of this conversation with this content that was not given out yet."""
        key = match_key(self._owner, messages, text)
        if key not in self._matches:
            found = await self._store.find_matches(key)
            self._matches[key] = [
                rollout
                for rollout in found
                if rollout.owner == self._owner and rollout.model_hash == self._model_hash
            ]
        matches = self._matches[key]
        place = next((i for i, rollout in enumerate(matches) if is_wanted(rollout)), None)
        return matches.pop(place) if place is not None else None


def check_on_policy(rollout: Rollout, *, corrects_importance: bool) -> None:
    """Refuse a rollout that was not drawn from a distribution training can score.

    `corrects_importance`: whether the loss weighs tokens by importance, which makes up for
    truncation (top_p, top_k, min_p, min_tokens, a grammar, a thinking budget).

    Raises:
        OffPolicyRollout: greedy, penalised or biased; or truncated without that correction.
    """
    sampling = rollout.sampling
    name = f"the rollout {rollout.completion_id} (index {rollout.index})"
    if sampling.temperature == 0:
        raise OffPolicyRollout(f"{name} was decoded greedily, so it has no distribution to learn from")
    if sampling.is_reshaped:
        raise OffPolicyRollout(f"{name} was sampled under penalties or logit_bias")
    if sampling.is_truncated and not corrects_importance:
        raise OffPolicyRollout(
            f"{name} was sampled under truncation, a grammar or a thinking budget, and loss.importance.mode is none",
            hint='Leave loss.importance out or use mode "token" or "sequence".',
            param="loss.importance.mode",
        )


def is_on_policy(rollout: Rollout, *, corrects_importance: bool) -> bool:
    """Whether check_on_policy would let it pass."""
    try:
        check_on_policy(rollout, corrects_importance=corrects_importance)
    except OffPolicyRollout:
        return False
    return True


def to_grpo(rollout: Rollout, reward: float) -> trainer_pb2.GrpoRollout:
    """The rollout as the trainer takes it, scored at the temperature it was drawn at."""
    return trainer_pb2.GrpoRollout(
        prompt_token_ids=rollout.prompt_token_ids,
        completion_token_ids=rollout.completion_token_ids,
        reward=reward,
        behaviour_logprobs=rollout.sampled_logprobs,
        temperature=rollout.sampling.temperature,
        source="rollout",
        adapter_version=rollout.adapter_version,
        completion_id=rollout.completion_id,
        index=rollout.index,
        is_truncated=rollout.finish_reason == "length",
    )
