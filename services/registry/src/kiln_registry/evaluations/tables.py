"""Tables of suites and runs, in the same database as the adapters."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Float, ForeignKey, Integer, String, Table, Text, UniqueConstraint

from kiln_registry.schema import metadata

suites = Table(
    "eval_suites",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("version", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("num_cases", Integer, nullable=False),
    Column("created_at_s", Float, nullable=False),
    Column("content", Text, nullable=False),
    UniqueConstraint("owner", "name", "version"),
)

runs = Table(
    "eval_runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("suite_id", String(64), ForeignKey("eval_suites.id"), nullable=False),
    Column("adapter", String(160), nullable=False),
    Column("settings_json", Text, nullable=False),
    Column("job_id", String(128), nullable=False),
    Column("idempotency_key", String(320), unique=True),  # NULL where none was given
    Column("status", String(16), nullable=False, index=True),
    Column("error_json", Text, nullable=False, default=""),
    Column("summary_json", Text, nullable=False, default=""),
    Column("created_at_s", Float, nullable=False),
    Column("started_at_s", Float, nullable=False, default=0.0),
    Column("finished_at_s", Float, nullable=False, default=0.0),
    Column("claim_epoch", Integer, nullable=False, default=0),
    Column("lease_ends_s", Float, nullable=False, default=0.0),
    # Claims in a row that added no result.
    Column("num_idle_claims", Integer, nullable=False, default=0),
)

cases = Table(
    "eval_cases",
    metadata,
    Column("run_id", String(64), ForeignKey("eval_runs.id"), primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("score", Float, nullable=False),
    Column("is_valid", Boolean, nullable=False),
    Column("answer", Text, nullable=False),
    Column("detail", Text, nullable=False),
)
