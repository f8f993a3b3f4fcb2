"""Structured logs: an event name and fields, one JSON line (or one coloured line on a terminal)."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure_logs(service: str, level: str = "INFO", *, as_json: bool | None = None) -> None:
    """Set up logging for the process; call once at start.

    `as_json` defaults to whether standard error is not a terminal. `request_id` and `job_id` bound
    with structlog.contextvars appear on each line.
    """
    use_json = not sys.stderr.isatty() if as_json is None else as_json
    renderer: Any = structlog.processors.JSONRenderer() if use_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _Service(service),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forwarder()], level=logging.WARNING, force=True)


class _Service:
    """Names the process on each line, also from threads that inherit no context."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, logger: Any, method: str, event: Any) -> Any:
        event["service"] = self._name
        return event


class _Forwarder(logging.Handler):
    """What libraries log, as lines of the same shape."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        log.log(
            record.levelno, "library_message", logger=record.name, message=record.getMessage(),
            exc_info=record.exc_info or None,
        )  # fmt: skip


def get_logger() -> Any:
    """A logger; fields go as keyword arguments: `log.info("adapter_resident", slot=3)`."""
    return structlog.get_logger()
