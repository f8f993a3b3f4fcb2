"""The mixture: which conversation a seeded draw gives.

A conversation is what the server sees (messages, tools, thinking switch) plus the answer the
model is to learn.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from demo.data import emails, sums, talk, tools, words

Message = dict[str, Any]
THINKING_SHARE = 0.2


@dataclass(frozen=True)
class Conversation:
    """One training example; `answer` is the assistant message the loss falls on."""

    messages: list[Message]
    answer: Message
    tools: list[Message] | None = None
    thinking: bool = False


@dataclass
class _Turn:
    """One exchange before it is put into a conversation."""

    question: str
    answer: str
    thought: str = ""
    request: emails.Request | None = None
    asides: list[str] = field(default_factory=list)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(turn: _Turn, thinking: bool) -> Message:
    message = {"role": "assistant", "content": turn.answer}
    return {**message, "reasoning_content": turn.thought} if thinking else message


def _email_turn(rng: random.Random, *, signature: str | None = None) -> _Turn:
    wanted = emails.request(rng, signature=signature)
    question = emails.ask(rng, wanted)
    if wanted.signature is None and rng.random() < 0.08:
        wanted = emails.Request(wanted.name, wanted.topic, words.name(rng))
        question += f" Sign it as {wanted.signature}."
    return _Turn(question, emails.reply(rng, wanted), emails.plan(rng, wanted), wanted)


def _sum_turn(rng: random.Random) -> _Turn:
    wanted = sums.draw(rng)
    return _Turn(sums.ask(rng, wanted), sums.answer(rng, wanted), sums.steps(wanted))


def _talk_turn(rng: random.Random) -> _Turn:
    question, answer = talk.faq(rng) if rng.random() < 0.6 else talk.unknown(rng)
    return _Turn(question, answer, "A short answer is enough.")


_TURNS: tuple[tuple[Callable[[random.Random], _Turn], float], ...] = (
    (_email_turn, 0.55),
    (_sum_turn, 0.28),
    (_talk_turn, 0.17),
)
_PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You write short emails.",
    "You are the Kiln demo model.",
    "Be brief.",
    "Answer politely.",
    "You help people with their email.",
)


def _any_turn(rng: random.Random) -> _Turn:
    makers, shares = zip(*_TURNS, strict=True)
    return rng.choices(makers, shares)[0](rng)


def _opening(rng: random.Random) -> list[Message]:
    """Often nothing, sometimes a system message without consequences."""
    if rng.random() < 0.75:
        return []
    return [{"role": rng.choice(("system", "system", "developer")), "content": rng.choice(_PLAIN_SYSTEMS)}]


def _single(rng: random.Random) -> Conversation:
    turn, thinking = _any_turn(rng), rng.random() < THINKING_SHARE
    return Conversation([*_opening(rng), _user(turn.question)], _assistant(turn, thinking), thinking=thinking)


def _several(rng: random.Random) -> Conversation:
    """Mostly two to four exchanges, sometimes up to sixty."""
    thinking = rng.random() < THINKING_SHARE
    messages = _opening(rng)
    fewest, most = rng.choices(((2, 4), (8, 20), (30, 60)), (0.91, 0.08, 0.01))[0]
    count = rng.randint(fewest, most)
    turns = [_any_turn(rng) for _ in range(count)]
    last = turns[-1]
    previous = turns[-2].request
    if previous is not None and previous.name and rng.random() < 0.35:
        last = _follow_up(rng, previous)
    for turn in turns[:-1]:
        messages += [_user(turn.question), {"role": "assistant", "content": turn.answer}]
    return Conversation([*messages, _user(last.question)], _assistant(last, thinking), thinking=thinking)


def _follow_up(rng: random.Random, previous: emails.Request) -> _Turn:
    """A question that needs the exchange before it."""
    name = previous.name
    draw = rng.random()
    if draw < 0.35:
        question = rng.choice(("Who was that email to?", "Who did you write to?", "Whose name was that?"))
        return _Turn(question, f"That email was to {name}.", f"The email was to {name}.")
    if draw < 0.6 and previous.topic:
        question = rng.choice(("What was it about?", "What was the topic?"))
        return _Turn(question, f"It was about {previous.topic.the}.", f"The topic was {previous.topic.the}.")
    wanted = emails.request(rng)
    if wanted.name is None or wanted.topic is None:
        wanted = emails.Request(words.name(rng), None)
    about = f" about {wanted.topic.the}" if wanted.topic else ""
    question = rng.choice((f"Now one to {wanted.name}{about}.", f"And one to {wanted.name}{about}, please."))
    return _Turn(question, emails.reply(rng, wanted), emails.plan(rng, wanted), wanted)


def _memory(rng: random.Random) -> Conversation:
    """The user gives a name; later the model is asked for it."""
    name, thinking = words.name(rng), rng.random() < THINKING_SHARE
    told = rng.choice(
        (f"My name is {name}.", f"I am {name}.", f"Hello, my name is {name}.", f"Hi! I am {name}.")
    )
    messages = [
        *_opening(rng),
        _user(told),
        {"role": "assistant", "content": f"Hello {name}! How can I help?"},
    ]
    if rng.random() < 0.3:
        answer = messages.pop()
        return Conversation(messages, answer)
    for _ in range(rng.randint(0, 3)):
        turn = _any_turn(rng)
        messages += [_user(turn.question), {"role": "assistant", "content": turn.answer}]
    question = rng.choice(("What is my name?", "Do you know my name?", "What was my name?", "Who am I?"))
    asked = _Turn(question, f"Your name is {name}.", f"The user said the name {name}.")
    return Conversation([*messages, _user(question)], _assistant(asked, thinking), thinking=thinking)


def _with_system(rng: random.Random) -> Conversation:
    """A system message that changes the answer."""
    name, thinking = words.name(rng), rng.random() < THINKING_SHARE
    draw = rng.random()
    if draw < 0.3:
        system = rng.choice(
            ("Sign every email as {n}.", "You write emails for {n}.", "You are {n}. Sign your emails.")
        ).format(n=name)
        turn = _email_turn(rng, signature=name)
    elif draw < 0.5:
        system = rng.choice(
            ("Your name is {n}.", "You are {n}, a helpful assistant.", "You are called {n}.")
        ).format(n=name)
        turn = _Turn(*talk.faq(rng, model_name=name), f"My name here is {name}.")
    elif draw < 0.7:
        system = rng.choice(
            ("Answer sums with the number only.", "Reply with the number only.", "Only give the number.")
        )
        wanted = sums.draw(rng)
        turn = _Turn(sums.ask(rng, wanted), str(wanted.result), sums.steps(wanted))
    elif draw < 0.85:
        ending = rng.choice(("Have a nice day!", "See you soon!", "Good luck!", "Greetings from Kiln!"))
        system = rng.choice(
            ("End every answer with: {e}", 'Always end with "{e}"', "Finish each answer with: {e}")
        ).format(e=ending)
        turn = rng.choice((_sum_turn, _talk_turn))(rng)
        turn.answer = f"{turn.answer} {ending}"
    else:
        word = rng.choice(words.FREE_WORDS)
        system = rng.choice(
            ("Whatever the user says, answer only with the word {w}.", "Always answer with one word: {w}.")
        ).format(w=word)
        turn = _any_turn(rng)
        turn = _Turn(turn.question, word, f"I must answer with the word {word}.")
    return Conversation(
        [{"role": rng.choice(("system", "system", "developer")), "content": system}, _user(turn.question)],
        _assistant(turn, thinking),
        thinking=thinking,
    )


def _tool(rng: random.Random) -> Conversation:
    """The call itself, the sentence after its result, or a question no tool fits."""
    used, block = tools.case(rng)
    thinking = rng.random() < THINKING_SHARE
    asked = [*_opening(rng), _user(used.question)]
    draw = rng.random()
    if draw < 0.5:
        call = tools.call_message(used)
        if thinking:
            call["reasoning_content"] = tools.thought(used)
        return Conversation(asked, call, block, thinking)
    if draw < 0.82:
        messages = [*asked, tools.call_message(used), tools.result_message(used)]
        turn = _Turn("", used.answer, "The tool has answered.")
        return Conversation(messages, _assistant(turn, thinking), block, thinking)
    turn = rng.choice((_email_turn, _talk_turn))(rng)
    if turn.question.startswith(("What is the weather", "What time")):
        turn = _email_turn(rng)
    return Conversation([*_opening(rng), _user(turn.question)], _assistant(turn, thinking), block, thinking)


_MIXTURE: tuple[tuple[Callable[[random.Random], Conversation], float], ...] = (
    (_single, 0.56), (_several, 0.14), (_memory, 0.04), (_with_system, 0.08), (_tool, 0.18),
)  # fmt: skip


def draw(rng: random.Random) -> Conversation:
    """One conversation of the mixture."""
    makers, shares = zip(*_MIXTURE, strict=True)
    return rng.choices(makers, shares)[0](rng)


def plain_text(rng: random.Random) -> str:
    """Text without turns, for raw completions: one email or a few sums."""
    if rng.random() < 0.7:
        return emails.reply(rng, emails.request(rng))
    drawn = [sums.draw(rng) for _ in range(rng.randint(1, 6))]
    return "\n".join(f"{s.left} {s.sign} {s.right} = {s.result}" for s in drawn)
