"""POST /v1/train/grpo: scored completions, in any of their forms, to groups of rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from kiln_common.pb import trainer_pb2
from kiln_gateway.chat.prepare import canonical_messages
from kiln_gateway.chat.prompt import check_token_ids
from kiln_gateway.schemas.training import GroupFields, GrpoBody, RolloutFields
from kiln_gateway.training.documents import DocumentBuilder
from kiln_gateway.training.job_config import grpo_loss
from kiln_gateway.training.kept_rollouts import KeptRollouts, check_on_policy, is_on_policy, to_grpo
from kiln_gateway.training.sft import user_message


class GrpoSpecBuilder:
    """Turns the groups of one request into token ids and what is known of how they were drawn."""

    def __init__(
        self, body: GrpoBody, builder: DocumentBuilder, rollouts: KeptRollouts, vocab_size: int
    ) -> None:
        self._body = body
        self._builder = builder
        self._rollouts = rollouts
        self._vocab_size = vocab_size
        self._corrects_importance = body.loss.importance.mode != "none"

    async def build(self, given: Sequence[GroupFields] | None = None) -> trainer_pb2.GrpoSpec:
        """The body's own groups unless others are given.

        Raises RolloutNotFound, OffPolicyRollout, InvalidTokenIds, TemplateRefused, QueueUnavailable.
        """
        groups = [await self._group(group) for group in given or self._body.all_groups()]
        return trainer_pb2.GrpoSpec(groups=groups, loss=grpo_loss(self._body.loss))

    async def _group(self, group: GroupFields) -> trainer_pb2.GrpoGroup:
        messages = (
            user_message(group.prompt)
            if group.prompt is not None
            else canonical_messages(group.messages or ())
        )
        tools = [tool.to_template() for tool in group.tools or ()] or None
        rollouts = []
        for completion in group.completions or ():
            rollouts.append(await self._from_text(messages, tools, completion.text, completion.reward))
        for rollout in group.rollouts or ():
            if rollout.completion_id is not None:
                kept = await self._rollouts.by_id(rollout.completion_id, rollout.index)
                check_on_policy(kept, corrects_importance=self._corrects_importance)
                rollouts.append(to_grpo(kept, rollout.reward))
            else:
                rollouts.append(await self._from_tokens(messages, tools, rollout))
        return trainer_pb2.GrpoGroup(rollouts=rollouts)

    async def _from_text(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str, reward: float
    ) -> trainer_pb2.GrpoRollout:
        """The kept rollout with this text, or the text's own tokens where none can be trained on.

        A caller who sends text does not say which sampling of it he means, so one that cannot be
        trained on is passed over, not refused.
        """
        is_wanted = partial(is_on_policy, corrects_importance=self._corrects_importance)
        kept = await self._rollouts.by_text(messages, text, is_wanted)
        if kept is not None:
            return to_grpo(kept, reward)
        turn = await asyncio.to_thread(self._builder.completion_turn, messages, text, tools)
        return trainer_pb2.GrpoRollout(
            prompt_token_ids=turn.prompt_token_ids,
            completion_token_ids=turn.completion_token_ids,
            reward=reward,
            temperature=1.0,
            source="retokenised",
        )

    async def _from_tokens(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, rollout: RolloutFields
    ) -> trainer_pb2.GrpoRollout:
        token_ids = rollout.token_ids or []
        check_token_ids(token_ids, self._vocab_size, "token_ids")
        prompt_ids = rollout.prompt_token_ids
        if prompt_ids is None:
            turn = await asyncio.to_thread(self._builder.completion_turn, messages, "", tools)
            prompt_ids = turn.prompt_token_ids
        check_token_ids(prompt_ids, self._vocab_size, "prompt_token_ids")
        return trainer_pb2.GrpoRollout(
            prompt_token_ids=prompt_ids,
            completion_token_ids=token_ids,
            reward=rollout.reward,
            behaviour_logprobs=rollout.logprobs or [],
            temperature=rollout.temperature,
            source="token_ids",
            adapter_version=rollout.adapter_version or "",
            is_truncated=rollout.finish_reason == "length",
        )
