"""`python -m kiln_registry`: the registry process."""

from __future__ import annotations

import asyncio
import sys

import structlog

from kiln_common.errors import KilnError
from kiln_common.logs import configure_logs
from kiln_common.rpc.tls import configure_tls
from kiln_common.settings import ConfigurationError, exit_for_configuration, read_settings
from kiln_common.stop_signals import end_on_stop_signals, wait_for_stop_signal
from kiln_common.tracing import configure_tracing
from kiln_common.variables import warn_of_unknown_variables
from kiln_registry.bootstrap import start_registry
from kiln_registry.settings import RegistrySettings

log = structlog.get_logger()


async def serve(settings: RegistrySettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    registry = await start_registry(settings)
    try:
        await wait_for_stop_signal()
    finally:
        await registry.stop()


def main() -> None:
    end_on_stop_signals()
    settings = read_settings(RegistrySettings)
    configure_logs("registry", settings.log_level)
    warn_of_unknown_variables()
    configure_tracing("registry")
    try:
        configure_tls()
        asyncio.run(serve(settings))
    except ConfigurationError as error:
        exit_for_configuration(error)
    except KilnError as error:
        log.error("registry_not_started", code=error.code, reason=str(error), hint=error.hint)
        sys.exit(1)


if __name__ == "__main__":
    main()
