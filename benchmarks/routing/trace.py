"""The trace: conversations that come back turn after turn, and single requests between them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kiln_common.pb import engine_pb2


@dataclass(frozen=True)
class TraceShape:
    num_conversations: int = 64
    num_turns: int = 4
    start_tokens: int = 1024
    turn_tokens: int = 64
    num_single: int = 64
    answer_tokens: int = 32
    # Of a turn's prompt, what the template writes after the last message: later turns do not repeat it.
    generation_prompt_tokens: int = 4
    vocab_size: int = 2560


@dataclass(eq=False)
class Conversation:
    """A single request is a conversation of one turn."""

    name: str
    num_turns: int
    tokens: list[int]
    turns: list[list[int]] = field(default_factory=list)
    num_done: int = 0

    def next_request(self, shape: TraceShape) -> engine_pb2.GenerateRequest:
        prompt = self.tokens + self.turns[self.num_done]
        sampling = engine_pb2.SamplingParams(
            max_tokens=shape.answer_tokens, ignore_eos=True, top_p=1.0, repetition_penalty=1.0
        )
        return engine_pb2.GenerateRequest(
            request_id=f"{self.name}/{self.num_done}",
            prompt_token_ids=prompt,
            sampling=sampling,
            num_stable_prefix_tokens=len(prompt) - shape.generation_prompt_tokens,
        )

    def take_answer(self, answer: list[int], shape: TraceShape) -> None:
        turn = self.turns[self.num_done][: -shape.generation_prompt_tokens]
        self.tokens = [*self.tokens, *turn, *answer]
        self.num_done += 1


def make_trace(shape: TraceShape, seed: int) -> list[Conversation]:
    """Whose turn it is, in order: every conversation's first turn before any second one, shuffled."""
    chance = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(1, shape.vocab_size) for _ in range(count)]

    talks = [
        Conversation(
            f"talk-{number}",
            shape.num_turns,
            tokens(shape.start_tokens),
            [tokens(shape.turn_tokens) for _ in range(shape.num_turns)],
        )
        for number in range(shape.num_conversations)
    ]
    singles = [
        Conversation(f"single-{number}", 1, tokens(shape.start_tokens), [tokens(shape.turn_tokens)])
        for number in range(shape.num_single)
    ]
    order = []
    for turn in range(shape.num_turns):
        share = singles[turn :: shape.num_turns]
        order += chance.sample([*talks, *share], len(talks) + len(share))
    return order
