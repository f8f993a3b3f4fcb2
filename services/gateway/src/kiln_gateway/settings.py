"""Gateway settings, read once from KILN_GATEWAY_* at start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kiln_common.api_keys import ApiKey
from kiln_common.base_model_id import ServedModelName
from kiln_common.loopback import is_loopback
from kiln_common.settings import LogLevel

CommaSeparated = Annotated[tuple[str, ...], NoDecode]


class GatewaySettings(BaseSettings):
    """Gateway process settings. A bad value stops the start."""

    model_config = SettingsConfigDict(env_prefix="KILN_GATEWAY_", frozen=True, protected_namespaces=())

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8420, ge=0, le=65535)
    reuse_port: bool = Field(
        False, description="share the port with other gateways of this machine that are set so too"
    )
    socket_path: str = Field(
        "", description="a Unix socket to answer on besides, for probes of one gateway of several"
    )
    allow_public_bind: bool = Field(
        False, description="listen on an address other than loopback although no API keys are set"
    )
    model_path: str = Field(description="checkpoint folder or hub id: tokenizer and chat template")
    served_model_name: ServedModelName = Field(
        "", description="the base model's id; empty takes the engine's own"
    )
    engine_addresses: CommaSeparated = Field(
        ("127.0.0.1:8430",),
        description="gRPC addresses, comma separated; engines that announce themselves on Redis are found"
        " besides, and need not be named",
    )
    engine_silence_s: PositiveFloat = Field(
        10.0, description="an engine that answers nothing for so long has its requests ended"
    )
    registry_address: str = "127.0.0.1:8431"
    trainer_addresses: CommaSeparated = Field(
        ("127.0.0.1:8432",),
        min_length=1,
        description="gRPC addresses, comma separated; all trainers serve one queue, so one that answers will do",
    )
    redis_url: str = Field("", description="empty: no rollouts are kept, and only configured engines found")

    store_default: bool = Field(
        True, description="whether requests that do not say `store` leave a rollout, or response, in Redis"
    )
    rollout_ttl_s: PositiveInt = Field(3600, description="how long a rollout is kept")
    rollout_max_bytes: PositiveInt = Field(
        256 * 1024 * 1024, description="most bytes of rollouts kept in Redis"
    )
    response_ttl_s: PositiveInt = Field(24 * 3600, description="how long a response of /v1/responses is kept")
    response_max_bytes: PositiveInt = Field(
        256 * 1024 * 1024, description="most bytes of responses kept in Redis"
    )
    enable_thinking_default: bool | None = Field(
        None, description="enable_thinking for requests that do not say; unset leaves it to the template"
    )
    max_body_bytes: PositiveInt = Field(32 * 1024 * 1024, description="largest JSON body")
    max_upload_bytes: PositiveInt = Field(
        2 * 1024**3, description="largest upload: a dataset, or an adapter, unpacked too"
    )
    max_job_dataset_bytes: PositiveInt = Field(
        64 * 1024 * 1024, description="largest dataset that one job learns from"
    )
    header_timeout_s: PositiveFloat = Field(
        20.0, description="how long a request's headers may take to arrive"
    )
    body_pause_s: PositiveFloat = Field(30.0, description="longest pause within a request's body")
    upload_timeout_s: PositiveFloat = Field(
        14_400.0, description="longest an upload may take: a dataset, or an adapter"
    )
    request_timeout_s: PositiveFloat = Field(
        600.0, description="longest a completion, or the body that asks for it, may take"
    )
    max_choices: PositiveInt = Field(128, description="most choices of one request (prompts times n)")
    max_batch_choices: PositiveInt = Field(4096, description="most answers of one batch (prompts times n)")
    max_prompt_logprobs: PositiveInt = Field(
        2**19,
        description="most log-probabilities of prompt tokens in one request: tokens of the prompts, times n, "
        "times one and the alternatives; each takes about 500 bytes",
    )

    eval_concurrency: NonNegativeInt = Field(
        16, description="cases of an evaluation run answered at once; 0: this gateway carries out no runs"
    )

    api_keys: tuple[ApiKey, ...] = Field((), description='JSON: [{"key": "…", "scopes": ["infer", "train"]}]')
    api_keys_file: Path | None = Field(
        None, description="JSON list of keys by their sha256, read again when it changes"
    )
    allowed_hosts: CommaSeparated = Field(
        (), description="Host names answered to besides localhost, comma separated; * is any"
    )
    allowed_origins: CommaSeparated = Field((), description="browser origins besides the server's own")
    log_bodies: bool = Field(
        False, description="log the body of each request that is understood, with its prompts and rewards"
    )
    log_level: LogLevel = "INFO"
    log_dir: str = Field(
        "", description="folder of the services' *.log files, for the dashboard to show; empty: none"
    )

    @field_validator(
        "engine_addresses", "trainer_addresses", "allowed_hosts", "allowed_origins", mode="before"
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return value or None

    @field_validator("enable_thinking_default", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return None if value in ("", "unset") else value

    @model_validator(mode="after")
    def _is_loopback_without_keys(self) -> Self:
        has_keys = self.api_keys or self.api_keys_file
        if not has_keys and not self.allow_public_bind and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is not loopback and no API keys are set: set KILN_GATEWAY_API_KEYS_FILE, "
                "or KILN_GATEWAY_ALLOW_PUBLIC_BIND=true if every caller may do everything"
            )
        return self
