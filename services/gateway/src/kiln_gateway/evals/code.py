"""Scores answers that are programs: they run in the sandbox, followed by the case's tests."""

from __future__ import annotations

import regex

from kiln_common.sandbox import Language, Limits, run, work_folder
from kiln_gateway.evals.scorers import Answer, Score, invalid
from kiln_gateway.schemas.evals import CodeScorer

_BLOCK = regex.compile(r"```[\w+-]*\n(.*?)(?:```|\Z)", regex.DOTALL)
_MOST_SHOWN = 2000


def score_code(scorer: CodeScorer, answer: Answer) -> Score:
    """Blocks the thread until the program has ended. Raises SandboxUnavailable."""
    code = program_of(answer.text)
    if not code.strip():
        return invalid("there is no code in the answer")
    limits = Limits(time_s=scorer.time_limit_s, memory_bytes=scorer.memory_limit_mb * 1024 * 1024)
    with work_folder() as folder:
        result = run(f"{code}\n{scorer.tests}\n", Language(scorer.language), folder.path, limits)
    if not folder.is_removed:
        return invalid("what the program left in its work folder could not be removed")
    said = result.message or (result.stderr.strip() or result.stdout.strip())[-_MOST_SHOWN:]
    return Score(float(result.is_success), detail=said)


def program_of(text: str) -> str:
    """All of the answer's fenced blocks, in order, or the whole answer where it has none."""
    blocks = _BLOCK.findall(text)
    return "\n".join(blocks) if blocks else text
