"""What the edge spends on a request and on a token, part by part: `python -m benchmarks.http.edge_parts`.

The parts run one after the other on one thread, without an engine, on the demo model's template and
tokenizer. Rows go to benchmarks/results/http.csv; times are processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine.results import ResultFile
from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.text.chat_template import ChatTemplate
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway import sse
from kiln_gateway.chat.choice import ChoiceAssembler, TextRules
from kiln_gateway.chat.completion_run import Choice, CompletionRun
from kiln_gateway.chat.prompt import PromptRenderer
from kiln_gateway.chat.responses import ChatAnswer
from kiln_gateway.model_resolver import Target

_FOLDER = Path(__file__).resolve().parents[2] / "demo" / "model"
_TURN = "Thank you for your letter of Monday; I have read it with care and would like to answer. " * 4
_NUM_TOKENS = 2000


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Processor seconds of one call: the least of five rounds of `repeats`."""
    rounds = []
    for _ in range(5):
        started_at = time.process_time()
        for _ in range(repeats):
            work()
        rounds.append((time.process_time() - started_at) / repeats)
    return min(rounds)


def conversation(num_turns: int) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": f"{i}: {_TURN}"} for i in range(num_turns)]
    return [{"role": "system", "content": _TURN * 2}, *messages]


def renderer(tokenizer: TextTokenizer) -> PromptRenderer:
    return PromptRenderer(ChatTemplate.load(_FOLDER), tokenizer, enable_thinking_default=False)


def measure_prompt(results: ResultFile, tokenizer: TextTokenizer, num_turns: int) -> None:
    """One rendering and one tokenisation, and all of a request's prompt: of a new and of a known conversation."""
    messages = conversation(num_turns)
    known = renderer(tokenizer)
    prompt = known.render_chat(messages, tools=None, variables={})

    def template() -> str:
        return known.render_text(messages, add_generation_prompt=True, variables={})

    def whole(prompts: PromptRenderer) -> None:
        prompts.render_chat(messages, tools=None, variables={})

    text = template()
    parts = {
        "template": seconds(template, 20),
        "tokenise": seconds(lambda: tokenizer.encode(text), 5),
        "new": seconds(lambda: whole(renderer(tokenizer)), 1) - seconds(lambda: renderer(tokenizer), 1),
        "known": seconds(lambda: whole(known), 20),
    }
    note = "; ".join(f"{name} {1e6 * value:.0f} us" for name, value in parts.items())
    results.add(
        f"edge, prompt of {num_turns} turn(s), {len(prompt.token_ids)} tokens",
        "one thread",
        num_samples=5,
        note=note,
    )


def measure_tokens(results: ResultFile, tokenizer: TextTokenizer) -> None:
    """A stream of chat, token by token: text out of ids, and events out of text."""
    ids = (tokenizer.encode(_TURN) * 40)[:_NUM_TOKENS]
    outputs = [
        engine_pb2.SequenceOutput(request_id="r", token_ids=[i], logprobs=[-1.0], sampled_logprobs=[-1.0])
        for i in ids
    ]

    def assemble() -> ChoiceAssembler:
        assembler = ChoiceAssembler(tokenizer, TextRules(splits_reasoning=True))
        for output in outputs:
            assembler.push(output)
        return assembler

    def stream() -> None:
        request = engine_pb2.GenerateRequest(prompt_token_ids=[1])
        choice = Choice(0, request, ChoiceAssembler(tokenizer, TextRules(splits_reasoning=True)))
        run = CompletionRun(
            "chatcmpl_x", "base", Target((common_pb2.AdapterRef(name="a", version=1),)), "", "", [choice],
            keeps_rollouts=False, match_key=None, num_prompts=1,
        )  # fmt: skip
        answer = ChatAnswer(run, tokenizer, has_logprobs=False, has_token_ids=False)
        for output in outputs:
            for chunk in answer.chunks(choice, choice.assembler.push(output)):
                sse.frame(chunk)

    text_us = 1e6 * seconds(assemble, 3) / len(ids)
    all_us = 1e6 * seconds(stream, 3) / len(ids)
    results.add(
        "edge, a streamed token",
        "one thread",
        num_samples=len(ids),
        note=f"text {text_us:.1f} us; chunk and event {all_us - text_us:.1f} us",
    )


def main() -> None:
    results = ResultFile("http", "cpu")
    tokenizer = TextTokenizer.load(_FOLDER)
    for num_turns in (1, 21):
        measure_prompt(results, tokenizer, num_turns)
    measure_tokens(results, tokenizer)


if __name__ == "__main__":
    main()
