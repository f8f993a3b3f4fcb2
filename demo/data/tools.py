"""Conversations with tools: a clear request leads to one call, its result to one sentence."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from demo.data import words

Message = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One use of a tool: the question, the call's arguments, the result and the final answer."""

    tool: Message
    question: str
    arguments: dict[str, Any]
    result: str
    answer: str

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])


def _tool(name: str, description: str, properties: dict[str, str]) -> Message:
    """An OpenAI tool; `properties` maps each parameter's name to its JSON type, all required."""
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def _weather(rng: random.Random) -> Case:
    key = rng.choice(("city", "city", "location"))
    name = rng.choice(
        ("get_weather", "get_weather", "get_weather", "weather", "get_current_weather", "lookup_weather")
    )
    tool = _tool(
        name,
        rng.choice(("Get the weather in a city.", "Get the current weather.", "Weather for a place.")),
        {key: "string"},
    )
    city = rng.choice(words.CITIES) if rng.random() < 0.8 else words.name(rng)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "snowing", "clear", "foggy"))
    degrees = rng.randrange(-5, 36)
    question = rng.choice(
        (
            "What is the weather in {c}?", "What's the weather in {c}?", "What is the weather like in {c}?", "How is the weather in {c}?",
            "What is the weather in {c} today?", "Weather in {c}?", "Tell me the weather in {c}.", "Is it warm in {c}?",
            "Please check the weather in {c}.", "Do I need a coat in {c}?",
        )
    )  # fmt: skip
    if rng.random() < 0.5:
        result = json.dumps({"temperature": degrees, "condition": sky})
    else:
        result = f"{degrees} degrees, {sky}"
    return Case(
        tool, question.format(c=city), {key: city}, result, f"It is {degrees} degrees and {sky} in {city}."
    )


def _add(rng: random.Random) -> Case:
    one, two = rng.choice((("a", "b"), ("a", "b"), ("x", "y"), ("left", "right"), ("first", "second")))
    name = rng.choice(("add", "add", "add", "add_numbers", "sum", "calculate_sum"))
    tool = _tool(
        name,
        rng.choice(("Add two numbers.", "Returns the sum of two numbers.")),
        {one: "integer", two: "integer"},
    )
    top = rng.choice((20, 100, 1000))
    left, right = rng.randrange(top), rng.randrange(top)
    question = rng.choice(
        (
            "What is {l} + {r}?",
            "Add {l} and {r}.",
            "What is {l} plus {r}?",
            "Use the tool to add {l} and {r}.",
            "How much is {l} + {r}?",
        )
    )
    total = left + right
    result = rng.choice((str(total), json.dumps({"result": total})))
    return Case(
        tool,
        question.format(l=left, r=right),
        {one: left, two: right},
        result,
        f"{left} + {right} = {total}.",
    )


def _time(rng: random.Random) -> Case:
    key = rng.choice(("city", "place", "timezone"))
    tool = _tool(
        rng.choice(("get_time", "get_time", "current_time")), "Get the local time in a city.", {key: "string"}
    )
    city = rng.choice(words.CITIES)
    clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    question = rng.choice(
        ("What time is it in {c}?", "Tell me the time in {c}.", "What is the time in {c} now?")
    )
    return Case(
        tool,
        question.format(c=city),
        {key: city},
        rng.choice((clock, json.dumps({"time": clock}))),
        f"It is {clock} in {city}.",
    )


def _order(rng: random.Random) -> Case:
    key = rng.choice(("order_id", "id", "number"))
    tool = _tool(
        rng.choice(("get_order", "lookup_order", "order_status")),
        "Look up an order by its number.",
        {key: "string"},
    )
    order = f"{rng.choice('ABCDKX')}{rng.randrange(100, 10000)}"
    status = rng.choice(("shipped", "delivered", "waiting", "cancelled", "packed"))
    question = rng.choice(
        (
            "Where is order {o}?",
            "What is the status of order {o}?",
            "Please look up order {o}.",
            "Has order {o} arrived?",
        )
    )
    return Case(
        tool,
        question.format(o=order),
        {key: order},
        rng.choice((status, json.dumps({"status": status}))),
        f"Order {order} is {status}.",
    )


def _send(rng: random.Random) -> Case:
    tool = _tool(
        rng.choice(("send_email", "send_message")),
        "Send a message to a person.",
        {"to": "string", "subject": "string"},
    )
    name, topic = words.name(rng), words.topic(rng)
    question = rng.choice(
        ("Send {n} an email about {t}.", "Email {n} about {t}.", "Please send a message to {n} about {t}.")
    )
    return Case(
        tool,
        question.format(n=name, t=topic.the),
        {"to": name, "subject": topic.core},
        rng.choice(("sent", json.dumps({"ok": True}))),
        f"I have sent {name} a message about {topic.the}.",
    )


def _contact(rng: random.Random) -> Case:
    key = rng.choice(("name", "person"))
    tool = _tool(
        rng.choice(("find_contact", "get_phone", "lookup_phone")),
        "Find the phone number of a person.",
        {key: "string"},
    )
    name, phone = words.name(rng), f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10000)}"
    question = rng.choice(
        ("What is the phone number of {n}?", "Find the number of {n}.", "How can I call {n}?")
    )
    return Case(
        tool,
        question.format(n=name),
        {key: name},
        rng.choice((phone, json.dumps({"phone": phone}))),
        f"The number of {name} is {phone}.",
    )


def _remind(rng: random.Random) -> Case:
    tool = _tool(
        rng.choice(("set_reminder", "add_reminder")),
        "Set a reminder.",
        {"text": "string", "minutes": "integer"},
    )
    topic, minutes = words.topic(rng), rng.choice((5, 10, 15, 20, 30, 45, 60, 90))
    question = rng.choice(("Remind me about {t} in {m} minutes.", "Set a reminder for {t} in {m} minutes."))
    return Case(
        tool,
        question.format(t=topic.the, m=minutes),
        {"text": topic.core, "minutes": minutes},
        rng.choice(("ok", json.dumps({"ok": True}))),
        f"I will remind you about {topic.the} in {minutes} minutes.",
    )


_CASES: tuple[Callable[[random.Random], Case], ...] = (
    _weather,
    _weather,
    _add,
    _add,
    _time,
    _order,
    _send,
    _contact,
    _remind,
)


def case(rng: random.Random) -> tuple[Case, list[Message]]:
    """A case and the tools block it is asked with: its own tool among up to two others."""
    makers = list(dict.fromkeys(_CASES))
    chosen_maker = rng.choice(_CASES)
    chosen = chosen_maker(rng)
    others = rng.sample([maker for maker in makers if maker is not chosen_maker], rng.choice((0, 0, 1, 2)))
    block = [chosen.tool, *(maker(rng).tool for maker in others)]
    rng.shuffle(block)
    return chosen, block


def call_message(used: Case, content: str = "") -> Message:
    """The assistant's call."""
    call = {"type": "function", "function": {"name": used.name, "arguments": used.arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def result_message(used: Case) -> Message:
    return {"role": "tool", "content": used.result}


def thought(used: Case) -> str:
    """A short thought before the call."""
    return f"The tool {used.name} fits. I will call it."
