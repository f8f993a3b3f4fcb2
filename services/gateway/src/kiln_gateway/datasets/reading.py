"""Rows of a dataset that is kept: all of them for a job, or some of them to look at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator
from typing import Any, cast

from kiln_common.errors import DatasetNotFound, ErrorKind, InvalidRequest, KilnError
from kiln_common.pb import dataset_pb2
from kiln_gateway.auth import Caller
from kiln_gateway.datasets.rows import DatasetFormat, LineSplitter, Row, parse_row
from kiln_gateway.ports import DatasetPort, closing


class WrongDatasetFormat(InvalidRequest):
    """The dataset's rows are of a form that this recipe does not learn from."""

    code = "wrong_dataset_format"
    hint = "sft learns from chat, prompt_completion and mixed, grpo from rollouts."


class DatasetTooLargeForJob(KilnError):
    """A job carries its own tokens, so there is a most that one can learn from."""

    code = "dataset_too_large_for_job"
    kind = ErrorKind.TOO_LARGE
    hint = "Split the dataset over several jobs, or raise KILN_GATEWAY_MAX_JOB_DATASET_BYTES."


class DatasetReader:
    """The datasets that one caller may see."""

    def __init__(self, datasets: DatasetPort, caller: Caller) -> None:
        self._datasets = datasets
        self._caller = caller

    async def find(self, dataset_id: str) -> dataset_pb2.Dataset:
        """Raises DatasetNotFound, also for another key's dataset."""
        found = await self._datasets.get(dataset_id)
        if found.owner != self._caller.owner and "admin" not in self._caller.scopes:
            raise DatasetNotFound(f"there is no dataset {dataset_id[:80]!r}", param="dataset")
        return found

    async def visible(self) -> list[dataset_pb2.Dataset]:
        return await self._datasets.list(None if "admin" in self._caller.scopes else self._caller.owner)

    async def rows(self, dataset: dataset_pb2.Dataset, max_bytes: int) -> list[tuple[int, Row]]:
        """Every row with its line's number. Raises DatasetTooLargeForJob."""
        if dataset.num_bytes > max_bytes:
            raise DatasetTooLargeForJob(
                f"{dataset.id} has {dataset.num_bytes} bytes, a job takes up to {max_bytes}", param="dataset"
            )
        format = cast(DatasetFormat, dataset.format)

        def parse(lines: list[tuple[int, bytes | None]]) -> list[tuple[int, Row]]:
            return [(number, parse_row(line or b"", format)) for number, line in lines]

        rows: list[tuple[int, Row]] = []
        async for lines in self._lines(dataset.id):
            rows += await asyncio.to_thread(parse, lines)
        return rows

    async def sample(self, dataset: dataset_pb2.Dataset, count: int, seed: int) -> list[dict[str, Any]]:
        """`count` rows drawn without replacement, in their order; the same seed draws the same ones."""
        chosen = {*random.Random(seed).sample(range(dataset.num_rows), min(count, dataset.num_rows))}
        num_seen = 0

        def pick(lines: list[tuple[int, bytes | None]]) -> list[dict[str, Any]]:
            return [
                {"line": number, "row": json.loads((line or b"").decode())}
                for position, (number, line) in enumerate(lines, start=num_seen)
                if position in chosen
            ]

        found: list[dict[str, Any]] = []
        async with contextlib.aclosing(self._lines(dataset.id)) as pieces:
            async for lines in pieces:
                found += await asyncio.to_thread(pick, lines)
                num_seen += len(lines)
                if len(found) == len(chosen):
                    break
        return found

    async def _lines(self, dataset_id: str) -> AsyncGenerator[list[tuple[int, bytes | None]]]:
        splitter = LineSplitter()

        def split(chunk: bytes) -> list[tuple[int, bytes | None]]:
            return [*splitter.feed(chunk)]

        async with closing(self._datasets.fetch(dataset_id)) as chunks:
            async for chunk in chunks:
                yield await asyncio.to_thread(split, chunk)
        yield [*splitter.finish()]
