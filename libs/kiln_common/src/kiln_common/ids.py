"""Identifiers: a prefix that says what it names, and 128 random bits."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """A fresh identifier such as "job_4f0c…": `prefix`, an underscore, 32 hex digits."""
    return f"{prefix}_{secrets.token_hex(16)}"
