"""Who is calling, and what the key allows: keys are known by their hash, from settings or from a file.

Keys are long and random, so a plain SHA-256 tells nothing about them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, model_validator

from kiln_common.errors import ErrorKind, KilnError
from kiln_common.settings import ConfigurationError

log = structlog.get_logger()

Scope = Literal["infer", "train", "admin"]
ALL_SCOPES: frozenset[str] = frozenset({"infer", "train", "admin"})
# How often a keys file is looked at, at most.
_LOOK_AGAIN_S = 1.0


class InvalidApiKey(KilnError):
    """The server asks for an API key, and none of those it knows was sent."""

    code = "invalid_api_key"
    kind = ErrorKind.UNAUTHENTICATED
    hint = "Send Authorization: Bearer KEY with a key that was configured."


class ScopeMissing(KilnError):
    """The key is known, and may not do this: what it may do is its scopes."""

    code = "scope_missing"
    kind = ErrorKind.FORBIDDEN
    hint = "Use a key that carries the scope."


class KeysFileUnusable(ConfigurationError):
    """The file of API keys is not there, may not be read, or is not what it should be."""

    code = "keys_file_unusable"
    hint = 'Expected a JSON list: [{"name": "…", "sha256": "…", "scopes": ["infer"]}]; python -m kiln_common.new_key writes an entry.'


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one owner may use, at all gateways together; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """`owner` stands for the key in what is stored; empty where no keys are configured."""

    owner: str
    scopes: frozenset[str]
    limits: KeyLimits = field(default_factory=KeyLimits)


class ApiKey(BaseModel):
    """One key, given in the clear or by its hash, what it may do and how much of it.

    Keys of one `name` belong to one owner, so that a key can be replaced without losing what is its.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", max_length=64)
    key: str = Field("", min_length=16, repr=False)
    sha256: str = Field("", pattern="^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = ("infer",)
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    tokens_per_day: PositiveInt | None = None

    @model_validator(mode="after")
    def _is_given_once(self) -> Self:
        if bool(self.key) == bool(self.sha256):
            raise ValueError("each key needs either `key` or `sha256`")
        return self

    @property
    def digest(self) -> str:
        return self.sha256 or digest_of(self.key)

    @property
    def has_limits(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute or self.tokens_per_day)

    def caller(self) -> Caller:
        owner = digest_of(f"name:{self.name}") if self.name else self.digest
        limits = KeyLimits(
            self.requests_per_minute or 0, self.tokens_per_minute or 0, self.tokens_per_day or 0
        )
        return Caller(owner[:32], frozenset[str](self.scopes), limits)


_Keys = TypeAdapter(tuple[ApiKey, ...])


class KeyRing:
    """The keys that are known now. A file is read again when it has changed; one that cannot be read
    leaves the keys as they were."""

    def __init__(self, keys: Sequence[ApiKey] = (), file: Path | None = None) -> None:
        """Raises KeysFileUnusable."""
        self._configured = tuple(keys)
        self._file = file
        self._version: tuple[int, ...] = ()
        self._looked_s = time.monotonic()
        if file is not None:
            self._version = _version_of(file)
        self._use(_read_keys(file) if file is not None else ())

    @property
    def has_limits(self) -> bool:
        return any(key.has_limits for key in self._keys)

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return self._file is None and not self._configured

    def limits_of(self, owner: str) -> KeyLimits:
        """What holds for work that goes on without its request: of the owner's keys the lowest limits."""
        self._look_again()
        found = [caller.limits for _, caller in self._callers if caller.owner == owner]

        def lowest(name: str) -> int:
            return min((most for limits in found if (most := getattr(limits, name))), default=0)

        return KeyLimits(*(lowest(limit.name) for limit in fields(KeyLimits)))

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header; keys are compared by hash, all of them, in constant time.

        Raises:
            InvalidApiKey: keys are configured and this is none of them.
        """
        if self.is_open:
            return Caller(owner="", scopes=ALL_SCOPES)
        self._look_again()
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise InvalidApiKey("the request carries no bearer key")
        presented = digest_of(token.strip())
        caller = None
        for digest, known in self._callers:
            if hmac.compare_digest(digest, presented):
                caller = known
        if caller is None:
            raise InvalidApiKey("the bearer key is not known")
        return caller

    def _use(self, of_file: Sequence[ApiKey]) -> None:
        self._keys = (*self._configured, *of_file)
        self._callers = [(key.digest, key.caller()) for key in self._keys]

    def _look_again(self) -> None:
        now_s = time.monotonic()
        if self._file is None or now_s - self._looked_s < _LOOK_AGAIN_S:
            return
        self._looked_s = now_s
        try:
            version = _version_of(self._file)
            if version == self._version:
                return
            self._version = version  # a broken file is one line in the log
            self._use(_read_keys(self._file))
        except KeysFileUnusable as error:
            log.error("keys_file_not_read", reason=str(error), effect="the keys stay as they were")
        else:
            log.info("keys_file_read", num_keys=len(self._keys))


def require_scope(caller: Caller, scope: str) -> None:
    """Raises ScopeMissing."""
    if scope not in caller.scopes:
        raise ScopeMissing(f"the key does not carry the scope {scope!r}")


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _version_of(file: Path) -> tuple[int, ...]:
    """Changes whenever the file does, also by being replaced. Raises KeysFileUnusable."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise KeysFileUnusable(f"{file} cannot be read: {error.strerror}") from error
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read_keys(file: Path) -> tuple[ApiKey, ...]:
    """Raises KeysFileUnusable; what the file says is not quoted."""
    try:
        keys = _Keys.validate_json(file.read_bytes())
    except OSError as error:
        raise KeysFileUnusable(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # An unknown field's name was typed by somebody, and may be a key.
        known = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
        place = ".".join(map(str, known))
        raise KeysFileUnusable(f"{file}: {place or 'the file'}: {first['msg']}") from None
    if any(key.key for key in keys):
        raise KeysFileUnusable(f"{file} has a key in the clear; it keeps hashes only")
    return keys
