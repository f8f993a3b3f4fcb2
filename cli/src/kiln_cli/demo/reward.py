"""The reward that `make demo` teaches: how courteous is a short email reply?

Plain Python on purpose: a reward can be any function of the prompt and the answer.
"""

import re

MIN_WORDS, MAX_WORDS = 8, 70

GREETING = re.compile(r"(hi|hello|hey|dear|good (morning|afternoon|evening))\b", re.IGNORECASE)
THANKS = re.compile(r"\bthank(s| you)\b", re.IGNORECASE)
HELP = re.compile(
    r"\b(let me know|(happy|glad) to help|here to help|any questions|reach out|get in touch|write (to me )?any ?time)\b",
    re.IGNORECASE,
)
SIGN_OFF = re.compile(
    r"(best wishes|(kind|warm|best) regards|warmly|all the best|take care|cheers"
    r"|have a (great|lovely|nice|good) (day|week|weekend))\b",
    re.IGNORECASE,
)


def recipient(prompt: str) -> str | None:
    """The name the prompt asks to write to ("... reply to Maria about ..."), if it gives one."""
    found = re.search(r"\bto ([A-Z][a-z]+)\b", prompt)
    return found.group(1) if found else None


def courtesies(prompt: str, answer: str) -> dict[str, bool]:
    """Which of the four courtesies the answer has."""
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()] or [""]
    name = recipient(prompt)
    return {
        "greets": bool(GREETING.match(lines[0])) and (name is None or name in lines[0]),
        "thanks": bool(THANKS.search(answer)),
        "offers_help": bool(HELP.search(answer)),
        "signs_off": any(SIGN_OFF.match(line) for line in lines[1:][-2:]),  # a name may follow it
    }


def score(prompt: str, answer: str) -> float:
    """The share of the four courtesies, from 0 to 1; 0 for an empty or a rambling answer."""
    if not MIN_WORDS <= len(answer.split()) <= MAX_WORDS:
        return 0.0
    found = courtesies(prompt, answer)
    return sum(found.values()) / len(found)
