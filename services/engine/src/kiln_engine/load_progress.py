"""How far the loading of weights is, in the log."""

from __future__ import annotations

import time

import structlog

log = structlog.get_logger()

_PROGRESS_INTERVAL_S = 2.0


class LoadProgress:
    """Logs the loading of weights: at the end, and every few seconds while it takes longer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logged_s = time.monotonic()

    def __call__(self, loaded_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if loaded_bytes == total_bytes or now - self._logged_s >= _PROGRESS_INTERVAL_S:
            percent = 100 * loaded_bytes // max(total_bytes, 1)
            log.info("loading_weights", model=self._name, percent=percent, mib=loaded_bytes >> 20)
            self._logged_s = now
