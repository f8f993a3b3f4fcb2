"""Runs untrusted Python or shell code: no network, one folder to write to, and hard limits."""

from kiln_common.sandbox.model import Language, Limits, Result, SandboxUnavailable, Stop
from kiln_common.sandbox.outside import run
from kiln_common.sandbox.own_folder import work_folder

__all__ = ["Language", "Limits", "Result", "SandboxUnavailable", "Stop", "run", "work_folder"]
