"""Runs untrusted Python or shell code: no network, one folder to write to, and hard limits."""

from kiln_common.sandbox.model import Language, Limits, Result, SandboxUnavailable, Stop
from kiln_common.sandbox.outside import run

__all__ = ["Language", "Limits", "Result", "SandboxUnavailable", "Stop", "run"]
