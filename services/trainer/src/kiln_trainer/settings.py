"""Trainer process settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, IPvAnyNetwork, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kiln_common.rpc.client_listener import ClientListener
from kiln_common.settings import LogLevel


class TrainerSettings(ClientListener, BaseSettings):
    """Trainer process settings, read once from KILN_TRAINER_*."""

    model_config = SettingsConfigDict(env_prefix="KILN_TRAINER_", frozen=True)

    listen: str = Field("127.0.0.1:8432", description="gRPC address: host:port or unix:/path")
    redis_url: str = Field(min_length=1, description="durable Redis that keeps the jobs")
    registry_address: str = Field(min_length=1, description="gRPC address results are published to")
    engine_addresses: Annotated[tuple[str, ...], NoDecode] = Field(
        min_length=1,
        description="gRPC addresses separated by commas; weights are mapped from the first, and all of"
        " them load results, as do engines that announce themselves on Redis",
    )
    teacher_addresses: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="gRPC addresses of engines whose models may teach, separated by commas; so may those of"
        " engines that announce themselves on Redis",
    )
    state_dir: Path = Field(description="folder of the checkpoints of jobs that have not ended")
    num_threads: PositiveInt = Field(1, description="CPU threads of one training step")
    device: str = Field(
        "",
        pattern=r"^(cuda:\d+)?$",
        description="a GPU of the trainer's own, such as cuda:1, to which the weights are copied once;"
        " empty trains where the engine's weights are",
    )
    gpu_sharing: Literal["auto", "mps", "time_slices"] = Field(
        "auto",
        description="how one GPU serves both; mps: at once, training in a partition; time_slices: in"
        " turns, with pauses; auto: mps where an MPS server runs; under one it is always a partition",
    )
    gpu_share_idle: float = Field(
        1.0, gt=0, le=1, description="training's part of the multiprocessors (mps) or the time, engine idle"
    )
    gpu_share_light: float = Field(0.5, gt=0, le=1, description="the same while up to 32 sequences run")
    gpu_share_heavy: float = Field(0.25, gt=0, le=1, description="the same while more run, or any wait")
    gpu_yield_s: NonNegativeFloat = Field(
        1.0, description="longest wait between two micro-batches while the engine's queue grows"
    )
    cpu_niceness: int = Field(
        5, ge=0, le=19, description="without a GPU: how far training gives way to decoding; 0 not at all"
    )
    claim_timeout_s: PositiveFloat = Field(10.0, description="silence after which a job is taken over")
    patience_s: PositiveFloat = Field(
        300.0, description="how long a job waits for an engine or registry that is away"
    )
    live_timeout_s: PositiveFloat = Field(
        30.0, description="how long engines get to load a result before the job lists them as not_live"
    )
    rollout_timeout_s: PositiveFloat = Field(
        600.0, description="how long one completion that a job samples may take before it is drawn again"
    )
    retention_s: PositiveInt = Field(7 * 24 * 3600, description="how long an ended job can be read")
    max_payload_bytes: PositiveInt = Field(64 * 1024**2, description="largest job accepted")
    webhook_allowed_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = Field(
        (), description="networks beyond the public internet that webhooks may go to, such as 10.0.0.0/8"
    )
    webhook_first_wait_s: PositiveFloat = Field(
        5.0, description="wait before a webhook is sent again; each one after it is twice as long"
    )
    stop_grace_s: NonNegativeFloat = Field(
        15.0, description="time a running step gets to end when the process stops"
    )
    log_level: LogLevel = "INFO"

    @field_validator("engine_addresses", "teacher_addresses", "webhook_allowed_networks", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value
