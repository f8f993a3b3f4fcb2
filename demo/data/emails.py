"""Email requests and replies.

Each courtesy of a reply (greeting by name, thanks, offer of help, warm sign-off) is drawn on
its own with `COURTESY_SHARE`, so the trained model is courteous about half the time and a
reward has something to raise.
"""

import random
from dataclasses import dataclass

from demo.data import words
from demo.data.words import Topic
from kiln_cli.demo.prompts import HELD_OUT_PAIRS, OPEN_PROMPT

COURTESY_SHARE = {"greets": 0.45, "thanks": 0.4, "offers_help": 0.4, "signs_off": 0.42}
_HELD_OUT = set(HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Request:
    """Who is written to and about what; either may be open."""

    name: str | None
    topic: Topic | None
    signature: str | None = None


def request(rng: random.Random, *, signature: str | None = None) -> Request:
    """Draw a request; pairs kept for measuring never appear."""
    while True:
        name = words.name(rng) if rng.random() < 0.9 else None
        topic = words.topic(rng) if rng.random() < 0.92 else None
        if name is None or topic is None or (name, topic.the) not in _HELD_OUT:
            return Request(name, topic, signature)


_ASK = (
    "Write {a} {kind}{to}{about}.",
    "Write {a} {kind}{to}{about}.",
    "Write {a} {kind}{to}{about}.",
    "Please write {a} {kind}{to}{about}.",
    "Can you write {a} {kind}{to}{about}?",
    "Could you draft {a} {kind}{to}{about}?",
    "Draft {a} {kind}{to}{about}.",
    "I need {a} {kind}{to}{about}.",
    "Help me write {a} {kind}{to}{about}.",
    "Compose {a} {kind}{to}{about}, please.",
    "{a_cap} {kind}{to}{about}, please.",
)
_ASK_NAMED = (
    "{name} wrote to me about {topic}. What should I answer?",
    "{name} wrote to me about {topic}. Please write a reply to {name}.",
    "Answer {name}'s email about {topic}.",
    "Reply to {name} about {topic}.",
    "Reply to {name} about {topic} in a few words.",
    'Email from {name}: "Hello, what is happening with {topic}?" Write a short reply to {name}.',
    'Email from {name}: "Can we talk about {topic}?" Please answer.',
)
_ARTICLES = (
    "a short",
    "a short, friendly",
    "a short",
    "a friendly",
    "a brief",
    "a quick",
    "a kind",
    "a polite",
    "a",
    "a simple",
)
_KINDS = (
    "email reply",
    "email reply",
    "email reply",
    "reply",
    "email",
    "answer",
    "message",
    "note",
    "email answer",
)
_ABOUT = (" about {topic}", " about {topic}", " about {topic}", " regarding {topic}", " on {topic}")


def ask(rng: random.Random, wanted: Request) -> str:
    """The user's message that asks for this email."""
    if wanted.name is None and wanted.topic is None and rng.random() < 0.5:
        return OPEN_PROMPT
    if wanted.name and wanted.topic and rng.random() < 0.3:
        return rng.choice(_ASK_NAMED).format(name=wanted.name, topic=wanted.topic.the)
    a = rng.choice(_ARTICLES)
    to = f" to {wanted.name}" if wanted.name else ""
    about = rng.choice(_ABOUT).format(topic=wanted.topic.the) if wanted.topic else ""
    if wanted.name and wanted.topic and rng.random() < 0.2:
        a, kind = "a short", "email reply"
        return f"Write {a} {kind} to {wanted.name} about {wanted.topic.the}."
    kind = rng.choice(_KINDS)
    if a == "a" and kind in ("email reply", "email", "answer", "email answer"):
        a = "an"
    return rng.choice(_ASK).format(a=a, a_cap=a[0].upper() + a[1:], kind=kind, to=to, about=about)


_HELLO = ("Hi", "Hi", "Hello", "Hello", "Dear", "Hey", "Good morning", "Good afternoon")
_THANKS_TOPIC = (
    "Thank you for your email about {the}.",
    "Thanks for your email about {the}.",
    "Thank you for your message about {the}.",
    "Thanks for your note about {the}.",
    "Thank you for writing about {the}.",
    "Thanks for asking about {the}.",
    "Thank you for telling me about {the}.",
    "Thank you for your patience with {the}.",
)
_THANKS_OPEN = (
    "Thank you for your email.",
    "Thanks for your message.",
    "Thank you for your note.",
    "Thanks for writing.",
    "Thank you for getting back to me.",
    "Thank you for your patience.",
)
_PLAIN_OPENING_TOPIC = (
    "I read your email about {the}.",
    "I got your message about {the}.",
    "This is about {the}.",
    "Your note about {the} has arrived.",
    "I saw your email about {the}.",
    "Here is a short answer about {the}.",
)
_PLAIN_OPENING_OPEN = (
    "I read your email.",
    "I got your message.",
    "Your note has arrived.",
    "I saw your email.",
)
_BODY = {
    "document": (
        "I will send {it} {when}.",
        "I will finish {it} {when}.",
        "I have read {it} and it all looks fine.",
        "I have read {the} and found two small mistakes.",
        "You will have {it} {when}.",
        "I am still working on {it}.",
        "I have put {the} in the shared folder.",
        "I will go through {it} with the team {when}.",
    ),
    "thing": (
        "I will have {it} checked {when}.",
        "Someone will look at {it} {when}.",
        "I have asked for a new part.",
        "I will bring {it} to the office {when}.",
        "You can pick {it} up {when}.",
        "I have found {it} in the storage room.",
        "We will replace {it} {when}.",
        "I left {the} at the front desk.",
    ),
    "event": (
        "I will be there {when}.",
        "It works well for me.",
        "I have put {the} in my calendar.",
        "I can not come, but please tell me how it went.",
        "Can we move {it} to another day?",
        "I will send the details {when}.",
        "I am looking forward to {it}.",
        "I have booked a room for {the}.",
    ),
    "order": (
        "I have checked, and {the} will arrive {when}.",
        "I have asked the shop about {it}.",
        "I will call the shop {when}.",
        "I am sorry about {the}.",
        "You will get the money back {when}.",
        "I have confirmed {it}.",
        "I will send you the new number {when}.",
        "I have written to the company about {it}.",
    ),
    "issue": (
        "I am sorry about {the}.",
        "I will look into {it} {when}.",
        "I have passed {it} on to the right team.",
        "I will call you {when}.",
        "We have fixed {it}.",
        "I understand, and I will write again {when}.",
        "We are working on {it}.",
        "I have made a note of {it}.",
    ),
    "free": (
        "I will look into {it} {when}.",
        "I will ask about {it} {when}.",
        "I have made a note of {the}.",
        "I will write again {when}.",
        "I like the idea of {the}.",
    ),
}
_BODY_ANY = (
    "I will look into {it} {when}.",
    "I will answer in full {when}.",
    "We can talk about {it} {when}.",
    "I will write again {when}.",
)
_BODY_OPEN = (
    "I will look into it {when}.",
    "I will answer in full {when}.",
    "I will write again {when}.",
    "I will call you {when}.",
    "I have read it and it all looks fine.",
    "Everything is going well here.",
    "I have passed it on to the team.",
    "It works well for me.",
)
_HELP = (
    "Please let me know if you have any questions.",
    "Let me know if I can do more.",
    "I am happy to help with anything else.",
    "I am glad to help if you need more.",
    "If anything is unclear, let me know.",
    "Please get in touch if you need anything.",
    "Feel free to reach out at any time.",
    "If you have any questions, just write to me.",
)
_PLAIN_END = (
    "That is all for now.",
    "More will follow soon.",
    "Please wait until then.",
    "I have nothing to add.",
    "We will see.",
)
_WARM = (
    "Best wishes,", "Best wishes,", "Kind regards,", "Kind regards,", "Warm regards,", "All the best,",
    "Warmly,", "Take care,", "Have a lovely day!", "Have a great week!", "Have a nice day!",
)  # fmt: skip
_COLD = ("Regards,", "Regards,", "Yours,", "Bye for now.", "Bye.")


def _sentence(
    rng: random.Random, options: tuple[str, ...], topic: Topic | None, *, named: bool = False
) -> str:
    """One sentence with the topic, as "it" once it has been named."""
    text = rng.choice(options)
    when = rng.choice(words.TIMES)
    if topic is None:
        return text.format(it="it", when=when)
    it = topic.it if named and rng.random() < 0.6 else topic.the
    return text.format(it=it, the=topic.the, when=when)


def _greeting(rng: random.Random, wanted: Request) -> str | None:
    hello = rng.choice(_HELLO)
    if rng.random() < COURTESY_SHARE["greets"]:
        who = wanted.name or rng.choice(("there", "", "", "all"))
        return f"{hello if who or hello != 'Dear' else 'Hello'} {who}".strip() + ","
    if wanted.name and rng.random() < 0.45:  # polite, but without the name that was given
        return rng.choice(("Hello,", "Hi,", "Hello there,", "Hi there,"))
    return None


def _paragraph(rng: random.Random, wanted: Request) -> str:
    topic = wanted.topic
    sentences = []
    if rng.random() < COURTESY_SHARE["thanks"]:
        sentences.append(_sentence(rng, _THANKS_TOPIC if topic else _THANKS_OPEN, topic))
    elif rng.random() < 0.6:
        sentences.append(_sentence(rng, _PLAIN_OPENING_TOPIC if topic else _PLAIN_OPENING_OPEN, topic))
    named = bool(sentences)
    bodies = (_BODY[topic.kind] + _BODY_ANY) if topic else _BODY_OPEN
    first = rng.choice(bodies)
    chosen = [first]
    if rng.random() < 0.55:  # a second sentence never names another time
        chosen.append(
            rng.choice([b for b in bodies if b != first and not ("{when}" in b and "{when}" in first)])
        )
    for body in chosen:
        sentences.append(_sentence(rng, (body,), topic, named=named))
        named = True
    if rng.random() < COURTESY_SHARE["offers_help"]:
        sentences.append(rng.choice(_HELP))
    elif rng.random() < 0.5:
        sentences.append(rng.choice(_PLAIN_END))
    return " ".join(sentences)


def _sign_off(rng: random.Random, wanted: Request) -> str | None:
    warm = rng.random() < COURTESY_SHARE["signs_off"]
    if not warm and not wanted.signature and rng.random() < 0.5:
        return None
    closing = rng.choice(_WARM if warm else _COLD)
    return f"{closing}\n{wanted.signature}" if wanted.signature else closing


def reply(rng: random.Random, wanted: Request) -> str:
    """The email: greeting, one paragraph and sign-off, each of them possibly absent."""
    parts = (_greeting(rng, wanted), _paragraph(rng, wanted), _sign_off(rng, wanted))
    return "\n\n".join(part for part in parts if part)


def plan(rng: random.Random, wanted: Request) -> str:
    """A short thought before the email, for answers with thinking switched on."""
    who = wanted.name or rng.choice(("someone", "a colleague"))
    what = wanted.topic.the if wanted.topic else "their message"
    return rng.choice(
        (
            f"The user wants an email to {who} about {what}. I will keep it short.",
            f"I should answer {who} about {what} in a few sentences.",
            f"An email to {who}. The topic is {what}. A short reply is enough.",
        )
    )
