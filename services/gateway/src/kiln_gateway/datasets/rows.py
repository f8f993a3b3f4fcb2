"""JSONL of training data, line by line: what a row may be, and what is wrong with the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from kiln_common.errors import InvalidRequest
from kiln_gateway.errors import InvalidField, InvalidJson
from kiln_gateway.request_body import parse_bytes
from kiln_gateway.schemas.training import GroupFields, SftExampleFields

# "mixed" has rows of the first two.
DatasetFormat = Literal["chat", "prompt_completion", "mixed", "rollouts"]
Row = SftExampleFields | GroupFields
FORMATS: tuple[DatasetFormat, ...] = get_args(DatasetFormat)

_MAX_LINE_BYTES = 8 * 1024 * 1024
_MAX_PROBLEMS_KEPT = 1000
_MAX_PROBLEMS_IN_MESSAGE = 10
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why a line, counted from 1, is not a row."""

    line: int
    code: str
    message: str


class InvalidDataset(InvalidRequest):
    """Some lines are not rows; nothing was kept."""

    code = "invalid_dataset"
    hint = "Mend the lines that `details.lines` names, and upload the file again."

    def __init__(self, problems: list[RowProblem], num_problems: int, num_lines: int) -> None:
        shown = [f"line {problem.line}: {problem.message}" for problem in problems[:_MAX_PROBLEMS_IN_MESSAGE]]
        if num_problems > len(shown):
            shown.append(f"and {num_problems - len(shown)} more")
        super().__init__(
            f"{num_problems} of {num_lines} lines are broken: {'; '.join(shown)}",
            details={
                "num_broken": num_problems,
                "num_lines": num_lines,
                "lines": [asdict(problem) for problem in problems],
            },
        )


class EmptyDataset(InvalidRequest):
    """The file holds no row to learn from."""

    code = "empty_dataset"
    hint = "Send at least one line with a JSON object."


class LineSplitter:
    """Cuts chunks of bytes into numbered lines, blank ones left out; computes nothing else.

    A line beyond the limit comes as None, and its bytes are dropped as they arrive.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._is_skipping = False
        self.num_lines = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield from self._number(line)
        if len(self._rest) > _MAX_LINE_BYTES:
            self._rest, self._is_skipping = b"", True

    def finish(self) -> Iterator[tuple[int, bytes | None]]:
        if self._rest or self._is_skipping:
            yield from self._number(self._rest)

    def _number(self, line: bytes) -> Iterator[tuple[int, bytes | None]]:
        self.num_lines += 1
        was_cut, self._is_skipping = self._is_skipping, False
        if was_cut or len(line) > _MAX_LINE_BYTES:
            yield self.num_lines, None
            return
        line = line.removeprefix(_BOM) if self.num_lines == 1 else line
        if line.strip():
            yield self.num_lines, line


class RowChecker:
    """Checks every row of a dataset of one format, which the rows decide where none is given."""

    def __init__(self, format: DatasetFormat | None = None) -> None:
        self.format = format
        self._is_given = format is not None
        self.num_rows = 0
        self.num_problems = 0
        self._problems: list[RowProblem] = []
        self._splitter = LineSplitter()

    def feed(self, chunk: bytes) -> None:
        for number, line in self._splitter.feed(chunk):
            self._check(number, line)

    def finish(self) -> DatasetFormat:
        """Raises InvalidDataset with every problem, EmptyDataset."""
        for number, line in self._splitter.finish():
            self._check(number, line)
        if self.num_problems:
            raise InvalidDataset(self._problems, self.num_problems, self._splitter.num_lines)
        if self.format is None or not self.num_rows:
            raise EmptyDataset("the dataset has no rows")
        return self.format

    def _check(self, number: int, line: bytes | None) -> None:
        try:
            if line is None:
                raise InvalidJson(f"the line has more than {_MAX_LINE_BYTES} bytes")
            self.format = self.format or _format_of(line)
            is_example = self.format != "rollouts"
            row = parse_row(line, "mixed" if is_example and not self._is_given else self.format)
            if isinstance(row, SftExampleFields) and form_of(row) != self.format and not self._is_given:
                self.format = "mixed"
            self.num_rows += 1
        except InvalidRequest as error:
            self.num_problems += 1
            if len(self._problems) < _MAX_PROBLEMS_KEPT:
                self._problems.append(RowProblem(number, error.code, str(error)))


def parse_row(line: bytes, format: DatasetFormat) -> Row:
    """One line as a row. Raises InvalidJson, InvalidField."""
    if format == "rollouts":
        group = parse_bytes(line, GroupFields)
        if any(rollout.completion_id for rollout in group.rollouts or ()):
            raise InvalidField(
                "invalid_value",
                "`rollouts` names a completion_id, which is forgotten after a while",
                param="rollouts",
                hint="Give its token_ids and logprobs.",
            )
        return group
    example = parse_bytes(line, SftExampleFields)
    if format not in (form_of(example), "mixed"):
        raise InvalidField(
            "invalid_value",
            f"the row has the form {form_of(example)} in a dataset of the form {format}",
            param="",
            hint="Leave the format out, or upload rows of each form as a dataset of their own.",
        )
    return example


def form_of(example: SftExampleFields) -> DatasetFormat:
    return "chat" if example.messages is not None else "prompt_completion"


def _format_of(line: bytes) -> DatasetFormat:
    try:
        keys: Any = json.loads(line)
    except (ValueError, RecursionError):
        keys = {}
    if not isinstance(keys, dict):
        keys = {}
    if "completions" in keys or "rollouts" in keys:
        return "rollouts"
    return "prompt_completion" if "prompt" in keys else "chat"
