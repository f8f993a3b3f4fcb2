"""The prompts of `make demo`: those it learns from, and those it is only measured on.

The demo model's own training text leaves out every recipient and topic pair of
`HELD_OUT_PAIRS` (demo/data/emails.py checks against this list), so a held-out prompt
is new to the base model as well as to the adapter.
"""

OPEN_PROMPT = "Write a short, friendly email reply."

TRAINING_PAIRS: tuple[tuple[str, str], ...] = (
    ("Maria", "the team lunch"),
    ("Tom", "the broken printer"),
    ("Aisha", "the project report"),
    ("Daniel", "the delayed delivery"),
    ("Sofia", "the new schedule"),
    ("Kenji", "the missing parcel"),
    ("Grace", "the job interview"),
    ("Omar", "the signed contract"),
    ("Elena", "the garden party"),
    ("Lucas", "the slow laptop"),
    ("Priya", "the sales figures"),
    ("Noah", "the wrong order"),
    ("Anna", "the travel plan"),
    ("Ben", "the spare key"),
    ("Chloe", "the photo album"),
)

HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = (
    ("Maria", "the late invoice"),
    ("Tom", "the budget meeting"),
    ("Aisha", "the lost badge"),
    ("Daniel", "the training course"),
    ("Sofia", "the broken lamp"),
    ("Kenji", "the annual report"),
    ("Grace", "the book club"),
    ("Omar", "the parking permit"),
    ("Elena", "the late refund"),
    ("Lucas", "the weekly call"),
    ("Priya", "the new website"),
    ("Noah", "the staff survey"),
    ("Anna", "the noisy fan"),
    ("Ben", "the hotel booking"),
    ("Chloe", "the price list"),
    ("Ivan", "the office move"),
)


def email_prompt(name: str, topic: str) -> str:
    """The request for one reply, such as "Write a short email reply to Tom about the spare key."."""
    return f"Write a short email reply to {name} about {topic}."


TRAINING_PROMPTS: tuple[str, ...] = (OPEN_PROMPT, *(email_prompt(*pair) for pair in TRAINING_PAIRS))
HELD_OUT_PROMPTS: tuple[str, ...] = tuple(email_prompt(*pair) for pair in HELD_OUT_PAIRS)
