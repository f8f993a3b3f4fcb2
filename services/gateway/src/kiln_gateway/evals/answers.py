"""Draws the answer to a case, and a judge's verdict, through the path every chat request takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kiln_gateway.auth import Caller
from kiln_gateway.chat.prepare import prepare_chat
from kiln_gateway.chat.responses import ChatAnswer
from kiln_gateway.chat.translated import chat_body
from kiln_gateway.evals.scorers import Answer, Score, ToolCall, choices_text, invalid
from kiln_gateway.gateway import Gateway
from kiln_gateway.model_resolver import Target
from kiln_gateway.schemas.chat import ChatCompletionBody
from kiln_gateway.schemas.evals import EvalCaseFields, JudgeScorer, MultipleChoiceScorer
from kiln_gateway.schemas.gate import EvalSettings

_PRIORITY = 1  # whoever chats goes first
_MOST_VERDICT_TOKENS = 16


async def draw_answer(
    gateway: Gateway, owner: str, case: EvalCaseFields, adapter: str, settings: EvalSettings
) -> Answer:
    """What `adapter` ("name@version" or "base") answers, of which the run's owner was allowed to ask when the run was accepted.

    Raises what a chat request raises.
    """
    messages = _messages(case)
    if isinstance(case.scorer, MultipleChoiceScorer):
        last = messages[-1]
        messages[-1] = {**last, "content": (last.get("content") or "") + choices_text(case.scorer)}
    tools = [tool.model_dump(exclude_none=True) for tool in case.tools or ()]
    body = _body(
        messages=messages,
        model=adapter,
        tools=tools or None,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        chat_template_kwargs=None if settings.thinking is None else {"enable_thinking": settings.thinking},
    )
    model_hash = (await gateway.engines.base_model()).model_hash
    answer, _ = await _answer(gateway, owner, body, await gateway.resolver.accepted(adapter, model_hash))
    return answer


async def judge(
    gateway: Gateway, owner: str, scorer: JudgeScorer, case: EvalCaseFields, answer: Answer, seed: int
) -> Score:
    """The judge's grade of an answer, from 0 to 1. Raises what a chat request raises."""
    is_verdict = scorer.scale == 2
    grades = ["wrong", "right"] if is_verdict else [str(grade) for grade in range(1, scorer.scale + 1)]
    words = "right or wrong" if is_verdict else f"a grade from 1 (worst) to {scorer.scale} (best)"
    question = "\n\n".join(f"{m['role']}: {m.get('content') or ''}" for m in _messages(case))
    prompt = (
        f"Judge an answer by these criteria.\n\nCriteria:\n{scorer.criteria}\n\n"
        f"Conversation:\n{question}\n\nAnswer to judge:\n{answer.text}\n\nReply with {words} and nothing else."
    )
    body = _body(
        messages=[{"role": "user", "content": prompt}],
        model=scorer.model,
        max_tokens=_MOST_VERDICT_TOKENS,
        temperature=0.0,
        seed=seed,
        chat_template_kwargs={"enable_thinking": False},
        structured_outputs={"choice": grades},
    )
    verdict, version = await _answer(gateway, owner, body)
    said = verdict.text.strip()
    if said not in grades:
        return invalid(f"{version} judged {said[:100]!r}")
    return Score(grades.index(said) / (len(grades) - 1), detail=f"{version} judged {said}")


def _messages(case: EvalCaseFields) -> list[dict[str, Any]]:
    if case.prompt is not None:
        return [{"role": "user", "content": case.prompt}]
    return [message.model_dump(exclude_none=True) for message in case.messages or ()]


def _body(**fields: Any) -> ChatCompletionBody:
    return chat_body({**fields, "store": False, "priority": _PRIORITY})


async def _answer(
    gateway: Gateway, owner: str, body: ChatCompletionBody, target: Target | None = None
) -> tuple[Answer, str]:
    """The answer, and the adapter version that gave it. Without `target`, what the body names as the owner sees it."""
    limits = replace(gateway.keys.limits_of(owner), requests_per_minute=0)  # the run was one request
    caller = Caller(owner=owner, scopes=frozenset({"infer"}), limits=limits)
    await gateway.limits.admit(caller)
    run = await prepare_chat(gateway, body, caller, is_one_of_many=True, target=target)
    events = await run.collect(gateway.engines, gateway.rollouts, gateway.metrics)
    whole = ChatAnswer(run, gateway.tokenizer, has_logprobs=False, has_token_ids=False).whole(events)
    message = whole["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    tool_calls = tuple(ToolCall(call["name"], call["arguments"]) for call in calls)
    return Answer(message["content"] or "", tool_calls), run.target.label
