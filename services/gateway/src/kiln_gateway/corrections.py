"""Corrections: "this answer should have been that", kept until a job has learned it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from redis.exceptions import RedisError

from kiln_common.bus import keys
from kiln_common.errors import ErrorKind, InvalidRequest, KilnError, QueueUnavailable
from kiln_common.ids import new_id
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.rollouts import Rollout

_MAX_KEPT = 100_000  # of one key
MAX_AT_ONCE = 10_000  # that a list shows, or a job learns
_STATES_PAGE, _WHOLE_PAGE = 1000, 100
_THINK_OPEN, _THINK_CLOSE, _TURN_END = "<think>", "</think>", "<|im_end|>"


class CorrectionNotFound(KilnError):
    """No correction that this key may see has this id."""

    code = "correction_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = "GET /v1/corrections lists the corrections there are."


class NothingToCorrect(InvalidRequest):
    """The completion ended inside its thinking, so it has no answer that could have been another."""

    code = "nothing_to_correct"
    hint = "Correct a completion that has an answer; a higher max_tokens lets the thinking end."


class TooManyCorrections(KilnError):
    """As many corrections are kept for this key as may be."""

    code = "too_many_corrections"
    kind = ErrorKind.CONFLICT
    hint = "DELETE /v1/corrections/{id} those that are not needed any more; GET /v1/corrections?status=used lists learned ones."


class NoUnusedCorrections(InvalidRequest):
    """Every correction of this key has been learned, or there is none."""

    code = "no_unused_corrections"
    hint = "POST /v1/corrections adds some; GET /v1/corrections says which job learned the others."


@dataclass(frozen=True, slots=True)
class Correction:
    """A better answer to the prompt of one completion, as tokens.

    `reserved_by` is the job that is learning it, `used_by` the one that has.
    """

    id: str
    owner: str
    completion_id: str
    index: int
    model_hash: str
    answer: str
    correction: str
    context_token_ids: list[int]  # the prompt, and the thinking that led to the answer
    completion_token_ids: list[int]
    created_at_s: float
    reserved_by: str = ""
    used_by: str = ""

    @property
    def status(self) -> str:
        return _status(self.used_by, self.reserved_by)


def _status(used_by: Any, reserved_by: Any) -> str:
    return "used" if used_by else "reserved" if reserved_by else "unused"


def correct(rollout: Rollout, text: str, tokenizer: TextTokenizer) -> Correction:
    """`text` in the place of the rollout's answer; its thinking stays. Raises NothingToCorrect."""
    context, answer_ids = _split_at_answer(rollout, tokenizer)
    answer = tokenizer.decode([token_id for token_id in answer_ids if not tokenizer.is_hidden(token_id)])
    # What the template puts between thinking and answer belongs to the turn, not to the answer.
    gap = (
        answer[: len(answer) - len(answer.lstrip("\n"))]
        if len(context) > len(rollout.prompt_token_ids)
        else ""
    )
    end_id = tokenizer.id_of(_TURN_END)
    ends_turn = bool(rollout.match_key) and end_id is not None
    return Correction(
        id=new_id("corr"),
        owner=rollout.owner,
        completion_id=rollout.completion_id,
        index=rollout.index,
        model_hash=rollout.model_hash,
        answer=answer.removeprefix(gap),
        correction=text,
        context_token_ids=context,
        completion_token_ids=[*tokenizer.encode(gap + text), *([end_id] if ends_turn and end_id else [])],
        created_at_s=time.time(),
    )


def _split_at_answer(rollout: Rollout, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Everything up to the answer, and the answer's tokens."""
    prompt, completion = rollout.prompt_token_ids, rollout.completion_token_ids
    open_id, close_id = tokenizer.id_of(_THINK_OPEN), tokenizer.id_of(_THINK_CLOSE)
    if close_id in completion:
        end = len(completion) - completion[::-1].index(close_id)  # type: ignore[arg-type]
        return [*prompt, *completion[:end]], completion[end:]
    opens_thinking = open_id in prompt and close_id not in prompt[_last(prompt, open_id) :]
    if opens_thinking or open_id in completion:
        raise NothingToCorrect(
            f"{rollout.completion_id} ended after {len(completion)} tokens inside its thinking",
            param="completion_id",
        )
    return prompt, completion


def _last(token_ids: Sequence[int], wanted: int | None) -> int:
    return max(position for position, token_id in enumerate(token_ids) if token_id == wanted)


class CorrectionStore:
    """Corrections in Redis, until they are deleted. `redis` is a redis.asyncio client, or None.

    Every method raises QueueUnavailable without Redis.
    """

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    async def add(self, correction: Correction) -> None:
        """Raises TooManyCorrections."""
        (num_kept,) = await self._run(lambda pipe: pipe.zcard(keys.corrections(correction.owner)))
        if num_kept >= _MAX_KEPT:
            raise TooManyCorrections(f"{num_kept} corrections are kept for this key, at most {_MAX_KEPT}")
        fields = {
            "owner": correction.owner,
            "completion_id": correction.completion_id,
            "index": correction.index,
            "model_hash": correction.model_hash,
            "answer": correction.answer,
            "correction": correction.correction,
            "context_token_ids": orjson.dumps(correction.context_token_ids),
            "completion_token_ids": orjson.dumps(correction.completion_token_ids),
            "created_at_s": correction.created_at_s,
        }

        def write(pipe: Any) -> None:
            pipe.hset(keys.correction(correction.id), mapping=fields)
            pipe.zadd(keys.corrections(correction.owner), {correction.id: correction.created_at_s})

        await self._run(write)

    async def newest(self, owner: str, status: str | None, limit: int) -> list[Correction]:
        """The newest first, of one status or of any."""
        last = limit - 1 if status is None else -1
        (ids,) = await self._run(lambda pipe: pipe.zrevrange(keys.corrections(owner), 0, last))
        if status is not None:
            ids = await self._first(ids, limit, lambda found, _: found == status)
        return await self._read([each.decode() for each in ids])

    async def unused(self, owner: str, model_hash: str) -> list[Correction]:
        """The oldest first, as many as one job learns."""
        (ids,) = await self._run(lambda pipe: pipe.zrange(keys.corrections(owner), 0, -1))
        wanted = ("unused", model_hash.encode())
        ids = await self._first(ids, MAX_AT_ONCE, lambda *found: found == wanted)
        return await self._read([each.decode() for each in ids])

    async def _first(
        self, ids: Sequence[bytes], limit: int, is_wanted: Callable[[str, bytes], bool]
    ) -> list[bytes]:
        """Up to `limit` ids whose status and model hash are wanted; nothing else of them is read."""
        chosen: list[bytes] = []
        for start in range(0, len(ids), _STATES_PAGE):
            page = ids[start : start + _STATES_PAGE]

            def read(pipe: Any, page: Sequence[bytes] = page) -> None:
                for each in page:
                    pipe.hmget(keys.correction(each.decode()), "used_by", "reserved_by", "model_hash")

            for each, (used_by, reserved_by, model_hash) in zip(page, await self._run(read), strict=True):
                if model_hash is not None and is_wanted(_status(used_by, reserved_by), model_hash):
                    chosen.append(each)
            if len(chosen) >= limit:
                break
        return chosen[:limit]

    async def get(self, correction_id: str, owner: str) -> Correction:
        """Raises CorrectionNotFound, also for another key's correction."""
        found = await self._read([correction_id])
        if not found or found[0].owner != owner:
            raise CorrectionNotFound(f"there is no correction {correction_id[:80]!r}")
        return found[0]

    async def delete(self, correction: Correction) -> None:
        def write(pipe: Any) -> None:
            pipe.delete(keys.correction(correction.id))
            pipe.zrem(keys.corrections(correction.owner), correction.id)

        await self._run(write)

    async def _read(self, ids: Sequence[str]) -> list[Correction]:
        """Whole ones, of which each may be as long as a prompt: some at a time, and decoded on a thread."""
        corrections: list[Correction] = []
        for start in range(0, len(ids), _WHOLE_PAGE):
            page = ids[start : start + _WHOLE_PAGE]

            def read(pipe: Any, page: Sequence[str] = page) -> None:
                for each in page:
                    pipe.hgetall(keys.correction(each))

            corrections += await asyncio.to_thread(_from_hashes, page, await self._run(read))
        return corrections

    async def _run(self, fill: Any) -> Any:
        if self._redis is None:
            raise QueueUnavailable("the gateway runs without Redis, so no corrections are kept")
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                fill(pipe)
                return await pipe.execute()
        except (RedisError, OSError) as error:
            raise QueueUnavailable(f"Redis does not answer: {error}") from error


def _from_hashes(ids: Sequence[str], found: Sequence[dict[bytes, bytes]]) -> list[Correction]:
    return [_from_hash(each, fields) for each, fields in zip(ids, found, strict=True) if fields]


def _from_hash(correction_id: str, fields: dict[bytes, bytes]) -> Correction:
    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode()

    return Correction(
        id=correction_id,
        owner=text("owner"),
        completion_id=text("completion_id"),
        index=int(text("index")),
        model_hash=text("model_hash"),
        answer=text("answer"),
        correction=text("correction"),
        context_token_ids=orjson.loads(fields[b"context_token_ids"]),
        completion_token_ids=orjson.loads(fields[b"completion_token_ids"]),
        created_at_s=float(text("created_at_s")),
        reserved_by=text("reserved_by"),
        used_by=text("used_by"),
    )
