"""POST /v1/train/opd: prompts to sample, or completions that are there, to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kiln_common.adapter_names import BASE_NAME
from kiln_common.pb import common_pb2, engine_pb2, trainer_pb2
from kiln_gateway.auth import Caller
from kiln_gateway.chat.prepare import canonical_messages
from kiln_gateway.chat.prompt import check_token_ids
from kiln_gateway.chat.sampling import stop_ids
from kiln_gateway.gateway import Gateway
from kiln_gateway.rollouts import Rollout
from kiln_gateway.schemas.chat import ChatMessage, Tool
from kiln_gateway.schemas.opd import OpdBody, OpdGroupFields, OpdPromptFields
from kiln_gateway.schemas.training import GivenRollout
from kiln_gateway.training.documents import DocumentBuilder
from kiln_gateway.training.kept_rollouts import KeptRollouts
from kiln_gateway.training.sft import user_message


class OpdSpecBuilder:
    """Turns one request into token ids, and its teacher into a version."""

    def __init__(
        self,
        body: OpdBody,
        gateway: Gateway,
        rollouts: KeptRollouts,
        base_model: common_pb2.BaseModel,
        caller: Caller,
    ) -> None:
        self._body = body
        self._gateway = gateway
        self._builder = DocumentBuilder(gateway.prompts)
        self._rollouts = rollouts
        self._base_model = base_model
        self._caller = caller

    async def build(self) -> trainer_pb2.OpdSpec:
        """Raises AdapterNotFound, AdapterMismatch, RolloutNotFound, InvalidTokenIds, TemplateRefused,
        QueueUnavailable."""
        body = self._body
        settings = trainer_pb2.OpdSettings(divergence=body.divergence.type, beta=body.divergence.beta)
        if body.teacher.adapter is not None:
            settings.teacher = await self._version_of(body.teacher.adapter)
        elif body.teacher.model is not None:
            # The trainer knows the engines, and settles which weights the name means.
            settings.teacher_model.model_id = body.teacher.model
            settings.teacher_model.model_hash = body.teacher.sha256 or ""
            settings.teacher_model.top_k = body.teacher.top_k
        if body.groups is not None:
            rollouts = [rollout for group in body.groups for rollout in await self._group(group)]
            return trainer_pb2.OpdSpec(settings=settings, rollouts=rollouts)
        settings.sampling.CopyFrom(self._sampling())
        settings.samples_per_prompt = body.rollout.n
        settings.prompts_per_step = body.rollout.prompts_per_step
        settings.refresh_every = body.rollout.refresh_every
        return trainer_pb2.OpdSpec(settings=settings, prompts=await self._prompts())

    async def _version_of(self, teacher: str) -> str:
        """ "base", or the version that the name means now: a job keeps its teacher."""
        if teacher == BASE_NAME or teacher in await self._gateway.base_ids():
            return BASE_NAME
        found = await self._gateway.resolver.version(
            teacher, self._base_model.model_hash, "teacher", self._caller
        )
        return f"{found.name}@{found.version}"

    async def _prompts(self) -> list[trainer_pb2.OpdPrompt]:
        settings = self._body.rollout
        variables = self._gateway.prompts.variables(
            settings.chat_template_kwargs, reasoning_effort=settings.reasoning_effort
        )

        def render(wanted: OpdPromptFields) -> trainer_pb2.OpdPrompt:
            prompt = self._gateway.prompts.render_chat(
                _messages(wanted.prompt, wanted.messages),
                tools=_tools(wanted.tools),
                variables=variables,
                most_tokens=self._base_model.max_model_len - 1,
            )
            return trainer_pb2.OpdPrompt(token_ids=prompt.token_ids)

        return await asyncio.to_thread(lambda: [render(wanted) for wanted in self._body.prompts or ()])

    def _sampling(self) -> engine_pb2.SamplingParams:
        settings = self._body.rollout
        return engine_pb2.SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=max(settings.top_k, 0),
            min_p=settings.min_p,
            repetition_penalty=1.0,
            stop_token_ids=stop_ids(settings.stop_token_ids, self._base_model, self._gateway.turn_end_id),
        )

    async def _group(self, group: OpdGroupFields) -> list[trainer_pb2.OpdRollout]:
        messages, tools = _messages(group.prompt, group.messages), _tools(group.tools)
        rollouts = [await self._from_text(messages, tools, text) for text in group.completions or ()]
        for given in group.rollouts or ():
            if given.completion_id is not None:
                rollouts.append(_kept(await self._rollouts.by_id(given.completion_id, given.index)))
            else:
                rollouts.append(await self._from_tokens(messages, tools, given))
        return rollouts

    async def _from_text(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str
    ) -> trainer_pb2.OpdRollout:
        kept = await self._rollouts.by_text(messages, text)
        if kept is not None:
            return _kept(kept)
        turn = await asyncio.to_thread(self._builder.completion_turn, messages, text, tools)
        return trainer_pb2.OpdRollout(
            prompt_token_ids=turn.prompt_token_ids,
            completion_token_ids=turn.completion_token_ids,
            source="retokenised",
        )

    async def _from_tokens(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, given: GivenRollout
    ) -> trainer_pb2.OpdRollout:
        token_ids, prompt_ids = given.token_ids or [], given.prompt_token_ids
        if prompt_ids is None:
            turn = await asyncio.to_thread(self._builder.completion_turn, messages, "", tools)
            prompt_ids = turn.prompt_token_ids
        check_token_ids(token_ids, self._base_model.vocab_size, "token_ids")
        check_token_ids(prompt_ids, self._base_model.vocab_size, "prompt_token_ids")
        return trainer_pb2.OpdRollout(
            prompt_token_ids=prompt_ids,
            completion_token_ids=token_ids,
            logprobs=given.logprobs or [],
            is_truncated=given.finish_reason == "length",
            source="token_ids",
            adapter_version=given.adapter_version or "",
        )


def _kept(rollout: Rollout) -> trainer_pb2.OpdRollout:
    """A kept rollout, however it was drawn: the teacher can judge any completion."""
    return trainer_pb2.OpdRollout(
        prompt_token_ids=rollout.prompt_token_ids,
        completion_token_ids=rollout.completion_token_ids,
        logprobs=rollout.logprobs,
        is_truncated=rollout.finish_reason == "length",
        source="rollout",
        adapter_version=rollout.adapter_version,
    )


def _messages(prompt: str | None, messages: Sequence[ChatMessage] | None) -> list[dict[str, Any]]:
    return user_message(prompt) if prompt is not None else canonical_messages(messages or ())


def _tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    return [tool.to_template() for tool in tools or ()] or None
