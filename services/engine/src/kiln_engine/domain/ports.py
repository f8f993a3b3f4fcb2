"""What the loop needs from outside: the only places where a test may put a fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kiln_engine.domain.adapter import AdapterLease, AdapterVersion, ResidentAdapter
from kiln_engine.domain.output_rules import CompiledGrammar
from kiln_engine.domain.plan import BatchPlan
from kiln_engine.domain.result import StepResult


class PendingStep(Protocol):
    """A step on its way through the device."""

    def draw(self) -> None:
        """Draw what could not be drawn at launch (`BatchPlan.has_late_rows`).

        Called once every step before has been committed, and before the next one is launched.
        """
        ...

    def wait(self) -> StepResult:
        """Wait for what the step drew. Once for each step, in the order of their launch."""
        ...


class Runner(Protocol):
    """Carries out plans on the device, in the order of their launch, and decides nothing."""

    def launch(self, plan: BatchPlan) -> PendingStep:
        """Start one step; the ones before may still be under way. Called from the loop thread only."""
        ...


class GrammarCompiler(Protocol):
    """Turns the text of grammars into what matchers start from."""

    async def compile(self, language: str, text: str) -> CompiledGrammar:
        """Compile away from the loop, or find what was compiled before; within a time limit.

        `language` is the name of a field of engine.proto's Grammar.

        Raises:
            GrammarNotSupported, GrammarTooLarge, GrammarTooSlow, GrammarsUnavailable: with the reason.
        """
        ...

    def close(self) -> None: ...


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...


class AdapterStore(Protocol):
    """Stacked adapter tensors on the device, one slot each; slot 0 is the base model."""

    def stage(self, slot: int, adapter_bytes: bytes | memoryview, config_json: str) -> None:
        """Parse and upload one adapter (PEFT safetensors and its config) beside what is in use.

        Called from a worker thread; nothing a step reads may change.

        Raises:
            KilnError: the bytes are not an adapter of this model, or its rank is too high.
        """
        ...

    def activate(self, slot: int) -> None:
        """Let steps use what was staged for the slot. Called from the loop thread between steps."""
        ...

    def clear(self, slot: int) -> None:
        """Forget the slot. Called from the loop thread between steps."""
        ...


class AdapterResidency(Protocol):
    """Brings adapter versions onto the device and keeps them there while they are held."""

    @property
    def resident(self) -> list[ResidentAdapter]: ...

    async def acquire(self, versions: Sequence[AdapterVersion]) -> AdapterLease:
        """Make the versions resident and hold them; all or none.

        Raises:
            KilnError: the code says why one of them cannot be; nothing is held.
        """
        ...

    async def check_owner(self, versions: Sequence[AdapterVersion], owner: str) -> None:
        """Raises AdapterNotFound where one of them is not `owner`'s; AdapterUnavailable if nobody can say."""
        ...

    def release(self, lease: AdapterLease) -> None: ...

    def newest(self, name: str) -> AdapterVersion | None:
        """What a name means, of the versions that steps may use now: the highest, unless it was rolled back."""
        ...

    async def prepare(self, version: AdapterVersion) -> tuple[int, bool]:
        """Make a version resident; returns its slot and whether it had to be loaded."""
        ...


class BaseWeights(Protocol):
    """The base model's bytes and who maps them."""

    @property
    def socket_path(self) -> str:
        """Unix socket that hands them out."""
        ...

    @property
    def num_leases(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def checksum(self) -> str:
        """Hex sha256 of the bytes as they are now. Slow; called from a worker thread."""
        ...
