"""Registry process settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from kiln_common.settings import LogLevel


class RegistrySettings(BaseSettings):
    """Registry process settings, read once from KILN_REGISTRY_*."""

    model_config = SettingsConfigDict(env_prefix="KILN_REGISTRY_", frozen=True)

    listen: str = Field("127.0.0.1:8431", description="gRPC address: host:port or unix:/path")
    state_dir: Path = Field(description="folder of the blobs and of the SQLite catalogue")
    database_url: str = Field("", description="SQLAlchemy URL; empty is SQLite in state_dir")
    redis_url: str = Field("", description="where changes are announced; empty announces nothing")
    max_adapter_bytes: PositiveInt = Field(2 * 1024**3, description="largest adapter accepted")
    max_dataset_bytes: PositiveInt = Field(2 * 1024**3, description="largest dataset accepted")
    max_versions_per_adapter: NonNegativeInt = Field(
        0, description="a publish beyond these versions of a name is refused; 0 is no limit"
    )
    max_bytes_per_key: NonNegativeInt = Field(
        0, description="a publish beyond these bytes of a key's adapters is refused; 0 is no limit"
    )
    keep_versions: NonNegativeInt = Field(
        0,
        description="versions of a name beyond these, the oldest first, are deleted when nothing needs them; "
        "0 keeps all",
    )
    collect_grace_s: float = Field(
        60.0, ge=0, description="versions that were looked up within this time are not collected"
    )
    stop_grace_s: float = Field(5.0, ge=0, description="time running calls get when the process stops")
    log_level: LogLevel = "INFO"
