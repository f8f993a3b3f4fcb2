"""Adapter names and the references clients write ("name", "name@3")."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from kiln_common.errors import ErrorKind, InvalidRequest

# The name under which requests ask for the bare base model.
BASE_NAME = "base"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


class InvalidAdapterName(InvalidRequest):
    """The name has characters, or a length, that no adapter's name has."""

    code = "invalid_adapter_name"
    hint = "Use 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit."


class ReservedAdapterName(InvalidRequest):
    """The name means the base model."""

    code = "reserved_adapter_name"
    kind = ErrorKind.INVALID_REQUEST
    hint = (
        "Choose another name: 'base' always means the bare base model, and the base model's id "
        "means its attached adapter, or the bare base model while none is attached."
    )


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """A name, and a version number or None for the version the name means now."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def check_adapter_name(name: str, reserved: Collection[str] = (), *, param: str = "adapter") -> None:
    """Refuse a name nothing can be published under.

    `reserved`: ids of base models, compared without regard to case; "base" always is.

    Raises:
        InvalidAdapterName: wrong characters or length.
        ReservedAdapterName: it means the base model.
    """
    if not _NAME.fullmatch(name):
        raise InvalidAdapterName(f"{name[:140]!r} is not an adapter name", param=param)
    if name.lower() in {BASE_NAME, *(other.lower() for other in reserved)}:
        raise ReservedAdapterName(f"the name {name!r} is reserved for the base model", param=param)


def parse_reference(reference: str, *, param: str = "adapter") -> AdapterReference:
    """ "name" or "name@version" in parts.

    Raises:
        InvalidAdapterName: it is neither.
    """
    name, at, version = reference.partition("@")
    if not _NAME.fullmatch(name) or (at and not _VERSION.fullmatch(version)):
        raise InvalidAdapterName(
            f"{reference[:140]!r} is not an adapter reference",
            hint='Write "name" for its latest version or "name@3" for a certain one.',
            param=param,
        )
    return AdapterReference(name, int(version) if at else None)
