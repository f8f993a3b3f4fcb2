"""What the server answers with, as frozen values; `raw` is the whole JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

JsonObject = dict[str, Any]
Messages = list[JsonObject]
Prompt = str | Messages
Reward = float | Mapping[str, float]

END_STATES = frozenset({"succeeded", "failed", "cancelled"})


class LoraOptions(TypedDict, total=False):
    rank: int
    alpha: float
    targets: Literal["all", "attention", "mlp"] | list[str]
    dropout: float


class JobOptions(TypedDict, total=False):
    """What every recipe takes; the server's defaults hold for what is left out (docs/api.md)."""

    base_adapter: str | None
    lora: LoraOptions
    learning_rate: float
    epochs: int
    batch_tokens: int
    gradient_accumulation: int
    warmup_ratio: float
    schedule: Literal["constant", "linear", "cosine"]
    weight_decay: float
    max_grad_norm: float
    optimizer: Literal["adamw", "muon"]
    train_mtp: bool
    seed: int
    checkpoint_every: int
    publish: Literal["end", "never"] | int
    attach: bool
    priority: int
    gate: JsonObject
    webhook: JsonObject
    metadata: JsonObject


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. Its exact tokens are kept on the server under `completion_id` and `index`."""

    messages: Messages
    text: str
    reasoning: str | None
    completion_id: str
    index: int
    adapter: str  # "name@version", or "base"
    finish_reason: str | None

    @property
    def prompt(self) -> str:
        """The text of the last user message, for rewards that look at it."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                content = message.get("content") or ""
                if isinstance(content, str):
                    return content
                return "".join(part.get("text", "") for part in content)
        return ""


@dataclass(frozen=True)
class JobEvent:
    """One event of a job: queued, claimed, started, step, publishing, published, or how it ended."""

    id: str
    type: str
    at_s: float
    raw: JsonObject

    @property
    def is_end(self) -> bool:
        return self.type in END_STATES


@dataclass(frozen=True)
class JobState:
    """A job as the server described it at one moment. Times are seconds since the epoch."""

    id: str
    kind: str
    status: str  # queued, running, succeeded, failed, cancelled
    queue_position: int | None
    step: int
    num_steps: int
    num_tokens: int
    eta_s: float
    metrics: dict[str, float] = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)
    error: JsonObject | None
    result: JsonObject | None
    raw: JsonObject = field(repr=False)

    @property
    def has_ended(self) -> bool:
        return self.status in END_STATES

    @property
    def version(self) -> str | None:
        """The version it published, "name@version"; None until it has, and for `publish: never`.

        Where its gate was not passed, the version that was kept aside under the job's id.
        """
        if not self.result or not self.result.get("version"):
            return None
        return f"{self.result['adapter']}@{self.result['version']}"

    @property
    def warnings(self) -> list[str]:
        """What is odd about the job, each with what to do; it runs as asked, and may not be what was meant."""
        return [f"{each['message']}. {each['hint']}" for each in self.raw.get("warnings") or ()]

    @property
    def gate_passed(self) -> bool | None:
        """Whether its result passed its gate; None before that is known, and without a gate."""
        gate = (self.result or {}).get("gate")
        return None if gate is None else bool(gate["passed"])

    @classmethod
    def of(cls, raw: JsonObject) -> JobState:
        progress = raw.get("progress") or {}
        return cls(
            id=raw["id"],
            kind=raw.get("kind", ""),
            status=raw["status"],
            queue_position=raw.get("queue_position"),
            step=progress.get("step", 0),
            num_steps=progress.get("steps", 0),
            num_tokens=progress.get("tokens", 0),
            eta_s=progress.get("eta_s") or 0.0,
            metrics=raw.get("metrics") or {},
            history=raw.get("history") or [],
            error=raw.get("error"),
            result=raw.get("result"),
            raw=raw,
        )


@dataclass(frozen=True)
class AdapterVersion:
    """Immutable bytes under a name: "name@version"."""

    id: str
    name: str
    version: int
    sha256: str
    num_bytes: int
    rank: int
    parent: str | None
    job_id: str | None
    metrics: dict[str, float] = field(repr=False)
    raw: JsonObject = field(repr=False)

    @classmethod
    def of(cls, raw: JsonObject) -> AdapterVersion:
        return cls(
            id=raw["id"],
            name=raw["name"],
            version=raw["version"],
            sha256=raw["sha256"],
            num_bytes=raw.get("bytes", 0),
            rank=raw.get("rank", 0),
            parent=raw.get("parent"),
            job_id=raw.get("job_id"),
            metrics=raw.get("metrics") or {},
            raw=raw,
        )


@dataclass(frozen=True)
class Adapter:
    """A name with its versions, oldest first."""

    name: str
    latest_version: int | None
    attached_version: int | None
    versions: list[AdapterVersion]
    raw: JsonObject = field(repr=False)

    @classmethod
    def of(cls, raw: JsonObject) -> Adapter:
        return cls(
            name=raw["name"],
            latest_version=raw.get("latest_version"),
            attached_version=raw.get("attached_version"),
            versions=[AdapterVersion.of(version) for version in raw.get("versions") or ()],
            raw=raw,
        )
