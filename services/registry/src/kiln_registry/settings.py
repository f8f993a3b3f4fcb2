"""Registry process settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveInt
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
    stop_grace_s: float = Field(5.0, ge=0, description="time running calls get when the process stops")
    log_level: LogLevel = "INFO"
