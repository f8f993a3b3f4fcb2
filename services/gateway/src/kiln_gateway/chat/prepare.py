"""From a checked request to a CompletionRun: prompts, limits, weights, one engine request a choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kiln_common.errors import InvalidValue, PromptTooLong
from kiln_common.ids import new_id
from kiln_common.pb import engine_pb2
from kiln_common.tracing import traced
from kiln_gateway.auth import Caller
from kiln_gateway.chat.choice import ChoiceAssembler, TextRules
from kiln_gateway.chat.completion_run import Choice, CompletionRun
from kiln_gateway.chat.output_rules import (
    AFTER_THINK_CLOSE,
    WantedGrammar,
    chat_grammar,
    text_grammar,
    thinking_budget,
    thinking_rules,
)
from kiln_gateway.chat.prompt import Prompt, check_token_ids
from kiln_gateway.chat.sampling import sampling_params, seed_of_choice
from kiln_gateway.errors import TooManyPromptLogprobs, UnsupportedField
from kiln_gateway.gateway import Gateway
from kiln_gateway.model_resolver import Target, WantedAdapter
from kiln_gateway.rollouts import match_key
from kiln_gateway.schemas.chat import ChatCompletionBody, ChatMessage, Tool
from kiln_gateway.schemas.completions import TextCompletionBody
from kiln_gateway.schemas.embeddings import EmbeddingsBody
from kiln_gateway.schemas.sampling import CompletionFields


@traced("prepare")
async def prepare_chat(
    gateway: Gateway,
    body: ChatCompletionBody,
    caller: Caller,
    *,
    id_prefix: str = "chatcmpl",
    is_one_of_many: bool = False,
    target: Target | None = None,
) -> CompletionRun:
    """Everything that can be wrong with a chat request is found here, before a token is computed.

    Where it `is_one_of_many` to be prepared, others get their turn in between. `target` is given
    where the weights are known already.
    """
    body.refuse_unsupported()
    if target is None:
        target = await resolve_target(gateway, body, caller)
    tools = body.active_tools
    grammar = await _chat_grammar(gateway, body)
    prompt = await chat_prompt(gateway, body, is_one_of_many=is_one_of_many)
    rules = TextRules(
        splits_reasoning=True,
        starts_in_reasoning=prompt.starts_in_reasoning,
        stop_strings=body.stop,
        min_tokens=body.min_tokens or 0,
        parameter_schemas=parameter_schemas(tools) if tools else None,
        allows_parallel_tool_calls=body.parallel_tool_calls is not False,
        has_grammar=grammar is not None,
        separator=AFTER_THINK_CLOSE if grammar is not None and grammar.is_whole else None,
    )
    identity = canonical_messages(body.messages)
    return await _run(
        gateway,
        body,
        caller,
        completion_id=new_id(id_prefix),
        prompts=[prompt],
        rules=rules,
        grammar=grammar,
        thinking=thinking_rules(prompt, thinking_budget(body), grammar, gateway.tokenizer),
        target=target,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        num_top_logprobs=body.num_top_logprobs,
        key_of=lambda content: match_key(caller.owner, identity, content),
    )


async def _chat_grammar(gateway: Gateway, body: ChatCompletionBody) -> WantedGrammar | None:
    """`chat_grammar` on a thread: a schema may be large. Raises as it does."""
    if not (body.tools or body.tool_choice or body.response_format or body.structured_outputs):
        return None
    return await asyncio.to_thread(chat_grammar, body, gateway.tokenizer)


async def chat_prompt(gateway: Gateway, body: ChatCompletionBody, *, is_one_of_many: bool = False) -> Prompt:
    """The conversation as the model reads it. Raises TemplateRefused, InvalidText, InvalidValue."""
    base_model = await gateway.engines.base_model()
    return await gateway.prompts.chat(
        [message.to_template() for message in body.messages],
        tools=[tool.to_template() for tool in body.active_tools] or None,
        variables=gateway.prompts.variables(
            body.chat_template_kwargs, reasoning_effort=body.reasoning_effort
        ),
        most_tokens=base_model.max_model_len - 1,
        is_one_of_many=is_one_of_many,
    )


@traced("prepare")
async def prepare_text(gateway: Gateway, body: TextCompletionBody, caller: Caller) -> CompletionRun:
    """The same for a text completion: no template, no reasoning, no tools."""
    body.refuse_unsupported()
    target = await resolve_target(gateway, body, caller)
    prompts = [Prompt(token_ids) for token_ids in await prompt_tokens(gateway, body.prompt, "prompt")]
    _check_prompt_logprobs(body, prompts, gateway.settings.max_prompt_logprobs)
    return await _run(
        gateway,
        body,
        caller,
        completion_id=new_id("cmpl"),
        prompts=prompts,
        rules=TextRules(stop_strings=body.stop, min_tokens=body.min_tokens or 0),
        grammar=await asyncio.to_thread(text_grammar, body.structured_outputs),
        thinking=None,
        target=target,
        max_tokens=body.max_tokens,
        num_top_logprobs=body.num_top_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        key_of=None,
    )


def _check_prompt_logprobs(body: TextCompletionBody, prompts: Sequence[Prompt], limit: int) -> None:
    """Raises TooManyPromptLogprobs. Every choice has its prompt's own."""
    if body.num_prompt_logprobs is None:
        return
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts) * body.num_choices
    num_per_token = 1 + body.num_prompt_logprobs
    if num_tokens * num_per_token > limit:
        asked_by = "echo" if body.prompt_logprobs is None else "prompt_logprobs"
        raise TooManyPromptLogprobs(num_tokens, num_per_token, limit, param=asked_by)


async def prompt_tokens(gateway: Gateway, prompts: Sequence[str | list[int]], param: str) -> list[list[int]]:
    """The token ids of each prompt, which is text or ids already.

    Raises:
        PromptTooLong: one leaves no room for a token. InvalidTokenIds, InvalidText
    """
    base_model = await gateway.engines.base_model()
    most = base_model.max_model_len - 1
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    of_texts = iter(await gateway.prompts.encode(texts, most, param))
    all_ids = [next(of_texts) if isinstance(prompt, str) else prompt for prompt in prompts]
    for token_ids in all_ids:
        if len(token_ids) > most:
            raise PromptTooLong(len(token_ids), most, param=param)
        check_token_ids(token_ids, base_model.vocab_size, param)
    return all_ids


async def resolve_target(gateway: Gateway, body: CompletionFields | EmbeddingsBody, caller: Caller) -> Target:
    """The weights that answer. Raises as ModelResolver.resolve does, and UnsupportedField."""
    if body.adapters is not None and body.is_adapter_given:
        raise UnsupportedField("adapters", "Send `adapter` or `adapters`, not both.")
    adapters = None
    if body.adapters is not None:
        adapters = [WantedAdapter(wanted.name, wanted.scale) for wanted in body.adapters]
    return await gateway.resolver.resolve(
        body.model,
        caller=caller,
        base_ids=await gateway.base_ids(),
        model_hash=(await gateway.engines.base_model()).model_hash,
        adapter=body.adapter,
        is_adapter_given=body.is_adapter_given,
        adapters=adapters,
    )


def canonical_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as far as two conversations are the same one."""
    return [message.to_template() for message in messages]


def parameter_schemas(tools: Sequence[Tool]) -> dict[str, dict[str, Any]]:
    """For each tool the schemas of its parameters by name."""
    schemas = {}
    for tool in tools:
        properties = (tool.function.parameters or {}).get("properties")
        schemas[tool.function.name] = properties if isinstance(properties, dict) else {}
    return schemas


async def _run(
    gateway: Gateway,
    body: CompletionFields,
    caller: Caller,
    *,
    completion_id: str,
    prompts: Sequence[Prompt],
    rules: TextRules,
    grammar: WantedGrammar | None,
    thinking: engine_pb2.Thinking | None,
    target: Target,
    max_tokens: int | None,
    num_top_logprobs: int,
    num_prompt_logprobs: int | None = None,
    key_of: Callable[[str], str] | None,
) -> CompletionRun:
    num_choices = len(prompts) * body.num_choices
    if num_choices > gateway.settings.max_choices:
        raise InvalidValue(
            f"the request asks for {num_choices} choices, the limit is {gateway.settings.max_choices}",
            param="n",
            hint="Send several requests.",
        )
    base_model = await gateway.engines.base_model()
    follows_latest = body.adapter_policy == "latest"
    choices: list[Choice] = []
    for prompt in prompts:
        sampling = sampling_params(
            body,
            base_model=base_model,
            num_prompt_tokens=len(prompt.token_ids),
            prompt_field="messages" if rules.splits_reasoning else "prompt",
            max_tokens=max_tokens,
            num_top_logprobs=num_top_logprobs,
            turn_end_id=gateway.turn_end_id if rules.splits_reasoning else None,
        )
        for _ in range(body.num_choices):
            index = len(choices)
            request = engine_pb2.GenerateRequest(
                request_id=f"{completion_id}-{index}",
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                adapters=target.adapters,
                adapter_policy=engine_pb2.ADAPTER_POLICY_LATEST if follows_latest else None,
                num_stable_prefix_tokens=prompt.num_stable_prefix_tokens,
                num_shared_prefix_tokens=prompt.num_shared_prefix_tokens,
                # Cached prefixes tell by their timing what others asked: keys do not share them.
                cache_salt=caller.owner + (body.cache_salt or ""),
                priority=body.priority or 0,
                timeout_s=gateway.settings.request_timeout_s,
                num_prompt_logprobs=num_prompt_logprobs,
                grammar=None if grammar is None else grammar.grammar,
                thinking=thinking,
            )
            if (seed := seed_of_choice(body.seed, index)) is not None:
                request.sampling.seed = seed
            choices.append(Choice(index, request, ChoiceAssembler(gateway.tokenizer, rules)))
    return CompletionRun(
        completion_id=completion_id,
        model=body.model or await gateway.served_model_id(),
        target=target,
        model_hash=base_model.model_hash,
        owner=caller.owner,
        choices=choices,
        keeps_rollouts=gateway.settings.store_default if body.store is None else body.store,
        match_key=key_of,
        num_prompts=len(prompts),
        follows_latest=follows_latest,
        charge=partial(gateway.limits.charge, caller),
        grammar_field="" if grammar is None else grammar.field,
    )
