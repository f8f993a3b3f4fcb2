"""Small sums: questions, answers and the steps between them.

One pair of numbers in twenty is never trained on (`is_held_out`), to measure sums the model
has not seen.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Sum:
    """`left` plus or minus `right`; both between 0 and 99, and never below zero."""

    left: int
    right: int
    sign: str = "+"

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right


def is_held_out(wanted: Sum) -> bool:
    """Whether this pair is kept out of the training text."""
    return (wanted.left * 31 + wanted.right * 17) % 20 == 3


def draw(rng: random.Random, *, held_out: bool = False) -> Sum:
    """Draw a sum from the trained pairs, or from the held-out ones."""
    while True:
        top = rng.choice((10, 20, 100, 100, 100))
        left, right = rng.randrange(top), rng.randrange(top)
        sign = "+" if rng.random() < 0.75 else "-"
        if sign == "-" and left < right:
            left, right = right, left
        wanted = Sum(left, right, sign)
        if is_held_out(wanted) == held_out:
            return wanted


_ASK = (
    "What is {l} {s} {r}?", "What is {l} {s} {r}?", "What is {l} {s} {r}?", "What's {l} {s} {r}?", "How much is {l} {s} {r}?",
    "{l} {s} {r}", "{l} {s} {r} =", "{l} {s} {r}?", "{l}{s}{r}", "Calculate {l} {s} {r}.", "Compute {l} {s} {r}.",
    "Please work out {l} {s} {r}.", "Can you tell me {l} {s} {r}?", "Solve {l} {s} {r}.",
)  # fmt: skip
_ASK_PLUS = (
    "Add {l} and {r}.", "What is the sum of {l} and {r}?", "What is {l} plus {r}?", "Please add {l} to {r}.",
    "I have {l} apples and get {r} more. How many do I have?", "{l} plus {r}?",
)  # fmt: skip
_ASK_MINUS = (
    "What is {l} minus {r}?", "Take {r} from {l}.", "Subtract {r} from {l}.", "{l} minus {r}?",
    "I have {l} apples and give away {r}. How many are left?",
)  # fmt: skip


def ask(rng: random.Random, wanted: Sum) -> str:
    """The user's question."""
    options = _ASK if rng.random() < 0.7 else (_ASK_PLUS if wanted.sign == "+" else _ASK_MINUS)
    return rng.choice(options).format(l=wanted.left, r=wanted.right, s=wanted.sign)


def answer(rng: random.Random, wanted: Sum) -> str:
    """The answer in one line; mostly the whole equation."""
    equation = f"{wanted.left} {wanted.sign} {wanted.right} = {wanted.result}"
    draw = rng.random()
    if draw < 0.7:
        return equation + "."
    return f"The answer is {wanted.result}." if draw < 0.9 else str(wanted.result)


def steps(wanted: Sum) -> str:
    """The thought: ones, then tens, with the carry spelled out."""
    left_ones, right_ones = wanted.left % 10, wanted.right % 10
    left_tens, right_tens = wanted.left // 10, wanted.right // 10
    if wanted.sign == "+":
        ones = left_ones + right_ones
        carry = ones // 10
        tens = left_tens + right_tens + carry
        carried = f" + {carry}" if carry else ""
        return (
            f"Ones: {left_ones} + {right_ones} = {ones}. "
            f"Tens: {left_tens} + {right_tens}{carried} = {tens}. So {wanted.result}."
        )
    borrow = 1 if left_ones < right_ones else 0
    ones = left_ones + 10 * borrow - right_ones
    tens = left_tens - borrow - right_tens
    borrowed = " - 1" if borrow else ""
    return (
        f"Ones: {left_ones + 10 * borrow} - {right_ones} = {ones}. "
        f"Tens: {left_tens} - {right_tens}{borrowed} = {tens}. So {wanted.result}."
    )
