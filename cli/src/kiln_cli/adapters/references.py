"""name, name@version and NAME=WEIGHT as the user types them."""

from __future__ import annotations

from collections.abc import Sequence

from kiln_cli.errors import InvalidReference


def parse(reference: str) -> tuple[str, int | None]:
    """Name and version; no version for a name alone. Raises InvalidReference."""
    name, mark, version = reference.partition("@")
    if not name or (mark and not version.isdecimal()):
        raise InvalidReference(f"{reference!r} is neither a name nor name@version")
    return name, int(version) if mark else None


def parse_version(reference: str) -> tuple[str, int]:
    """Name and version, both given. Raises InvalidReference."""
    name, version = parse(reference)
    if version is None:
        raise InvalidReference(f"{reference!r} does not say which version: {reference}@VERSION")
    return name, version


def parse_weights(sources: Sequence[str]) -> dict[str, float]:
    """Weight by reference; 1 where none is given. Raises InvalidReference."""
    weights = {}
    for source in sources:
        reference, mark, text = source.partition("=")
        parse(reference)
        try:
            weights[reference] = float(text) if mark else 1.0
        except ValueError:
            raise InvalidReference(f"{source!r} is not NAME=WEIGHT") from None
    return weights
