"""Measures a demo model: courtesy of its emails, sums, tool calls, and how often its draft is right.

Sampling here recomputes the whole prompt for every token: slow and simple, and independent of
the engine. Legend: T tokens in a packed step, R prompts, V vocabulary.
"""

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from demo.data import conversations, sums, tools
from demo.data.corpus import PackedStep
from demo.data.rendering import render_prompt
from demo.data.tokenizer import END_OF_TEXT, TURN_END, special_id
from kiln_cli.demo.prompts import HELD_OUT_PROMPTS, OPEN_PROMPT
from kiln_cli.demo.reward import courtesies, score
from kiln_nn.config import ModelConfig
from kiln_nn.packed_model import PackedModel
from kiln_nn.weights.names import EMBEDDING

MAX_ANSWER_TOKENS = 80


@dataclass(frozen=True)
class DemoModel:
    """A config, its parameters and its tokenizer, ready to answer."""

    config: ModelConfig
    parameters: Mapping[str, torch.Tensor]
    tokenizer: Tokenizer

    @torch.no_grad()
    def answer(
        self, prompts: list[str], *, temperature: float, seed: int = 0, max_tokens: int = MAX_ANSWER_TOKENS
    ) -> list[str]:
        """Answer rendered prompts together; temperature 0 takes the likeliest token.

        The end-of-turn token is left out of the text, tool and thinking marks are kept.
        """
        packed = PackedModel(self.config, self.parameters)
        head_VD = self.parameters[EMBEDDING]
        generator = torch.Generator(head_VD.device).manual_seed(seed)
        stops = {special_id(self.tokenizer, END_OF_TEXT), special_id(self.tokenizer, TURN_END)}
        rows = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(max_tokens):
            bounds = [0]
            for row in running:
                bounds.append(bounds[-1] + len(rows[row]))
            token_ids_T = torch.tensor([i for row in running for i in rows[row]], device=head_VD.device)
            hidden_TD = packed.hidden_states(token_ids_T, tuple(bounds))
            last_R = torch.tensor(bounds[1:], device=head_VD.device) - 1
            logits_RV = (hidden_TD[last_R] @ head_VD.T).float()
            for row, token_id in zip(running, _choose(logits_RV, temperature, generator), strict=True):
                rows[row].append(token_id)
                answers[row].append(token_id)
            running = [row for row in running if rows[row][-1] not in stops]
            if not running:
                break
        return [self._text(ids, stops) for ids in answers]

    def _text(self, ids: list[int], stops: set[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i not in stops], skip_special_tokens=False)


def _choose(logits_RV: torch.Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits_RV.argmax(-1).tolist()
    probabilities = torch.softmax(logits_RV / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()


def _chat(text: str, **options: Any) -> str:
    return render_prompt([{"role": "user", "content": text}], **options)


def measure_emails(model: DemoModel, samples_per_prompt: int, seed: int = 0) -> dict[str, Any]:
    """Reward on the held-out prompts at temperature 1, and what it is made of."""
    prompts = [prompt for prompt in (*HELD_OUT_PROMPTS, OPEN_PROMPT) for _ in range(samples_per_prompt)]
    answers = model.answer([_chat(prompt) for prompt in prompts], temperature=1.0, seed=seed)
    rewards = [score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    found = [courtesies(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    groups = [rewards[i : i + samples_per_prompt] for i in range(0, len(rewards), samples_per_prompt)]
    lengths = [len(model.tokenizer.encode(answer).ids) for answer in answers]
    topics = [prompt.rsplit(" the ", 1)[-1].rstrip(".") for prompt in prompts]
    named = [topic in answer for topic, answer in zip(topics, answers, strict=True)]
    return {
        "reward_mean": statistics.mean(rewards),
        "reward_deviation": statistics.stdev(rewards),
        "deviation_within_prompt": statistics.mean(statistics.pstdev(group) for group in groups),
        "num_samples": len(rewards),
        "courtesies": {key: statistics.mean(f[key] for f in found) for key in found[0]},
        "answer_tokens_mean": statistics.mean(lengths),
        "answer_tokens_max": max(lengths),
        "topic_named_share": statistics.mean(named),
        "open_prompt_reward_mean": statistics.mean(groups[-1]),
        "examples": answers[:: max(1, samples_per_prompt)][:6] + answers[-2:],
    }


def measure_sums(model: DemoModel, count: int, *, held_out: bool, thinking: bool, seed: int = 1) -> float:
    """Share of sums answered rightly by the likeliest answer."""
    rng = random.Random(seed)
    drawn = [sums.draw(rng, held_out=held_out) for _ in range(count)]
    prompts = [_chat(f"What is {s.left} {s.sign} {s.right}?", thinking=thinking) for s in drawn]
    answers = model.answer(prompts, temperature=0, max_tokens=64)
    last_words = [(answer.replace(".", " ").split() or [""])[-1] for answer in answers]
    return statistics.mean(word == str(s.result) for word, s in zip(last_words, drawn, strict=True))


def measure_tools(model: DemoModel, count: int, *, thinking: bool, seed: int = 2) -> float:
    """Share of clear requests answered by exactly the right call."""
    rng = random.Random(seed)
    cases = [tools.case(rng) for _ in range(count)]
    prompts = [_chat(used.question, tools=block, thinking=thinking) for used, block in cases]
    answers = model.answer(prompts, temperature=0)
    return statistics.mean(
        answer.split("</think>")[-1].strip() == expected_call(used)
        for answer, (used, _) in zip(answers, cases, strict=True)
    )


def expected_call(used: tools.Case) -> str:
    """The call's text as the template writes it."""
    lines = [f"<tool_call>\n<function={used.name}>"]
    lines += [f"<parameter={key}>\n{value}\n</parameter>" for key, value in used.arguments.items()]
    return "\n".join([*lines, "</function>\n</tool_call>"])


@torch.no_grad()
def measure_drafts(model: DemoModel, steps: list[PackedStep]) -> float:
    """Share of answer tokens where the MTP layer's likeliest token is the model's own likeliest."""
    packed = PackedModel(model.config, model.parameters)
    head_VD = model.parameters[EMBEDDING]
    agreed = total = 0
    for step in (step.to(head_VD.device) for step in steps):
        hidden = packed.forward(step.token_ids_T, step.cu_seqlens)
        draft_TD = packed.mtp_hidden_states(hidden, step.token_ids_T, step.cu_seqlens)
        position = step.target_positions(2)
        position = position[step.weight_T[position + 2] == 1]
        drafted = (draft_TD[position] @ head_VD.T).argmax(-1)
        own = (hidden.after_norm_TD[position + 1] @ head_VD.T).argmax(-1)
        agreed += int((drafted == own).sum())
        total += len(position)
    return agreed / total


def sample_conversations(model: DemoModel, count: int, seed: int = 3) -> list[tuple[str, str]]:
    """Random conversations of the mixture, each with the model's answer at temperature 1."""
    rng = random.Random(seed)
    drawn = [conversations.draw(rng) for _ in range(count)]
    prompts = [render_prompt(c.messages, c.tools, thinking=c.thinking) for c in drawn]
    return list(zip(prompts, model.answer(prompts, temperature=1.0, seed=seed), strict=True))


def measure(
    model: DemoModel, steps: list[PackedStep], *, samples_per_prompt: int, count: int
) -> dict[str, Any]:
    """All measures; `count` sums and tool requests each."""
    return {
        "emails": measure_emails(model, samples_per_prompt),
        "sums_trained_pairs": measure_sums(model, count, held_out=False, thinking=False),
        "sums_held_out_pairs": measure_sums(model, count, held_out=True, thinking=False),
        "sums_held_out_pairs_thinking": measure_sums(model, count, held_out=True, thinking=True),
        "tool_calls_exact": measure_tools(model, count, thinking=False),
        "tool_calls_exact_thinking": measure_tools(model, count, thinking=True),
        "draft_agreement": measure_drafts(model, steps),
    }
