"""`python -m kiln_gateway`: read the settings, serve until told to stop."""

from __future__ import annotations

import asyncio
import sys

import structlog

from kiln_common.errors import KilnError
from kiln_common.logs import configure_logs
from kiln_common.rpc.tls import configure_tls
from kiln_common.settings import ConfigurationError, exit_for_configuration, read_settings
from kiln_common.stop_signals import end_on_stop_signals, ignore_stop_signals
from kiln_common.tracing import configure_tracing
from kiln_common.variables import warn_of_unknown_variables
from kiln_gateway.app import create_app
from kiln_gateway.bootstrap import open_clients
from kiln_gateway.listeners import open_listeners
from kiln_gateway.server import GatewayServer
from kiln_gateway.settings import GatewaySettings

# How long running answers may take to end once the gateway is told to stop.
_GRACE_S = 10


async def serve(settings: GatewaySettings) -> None:
    log = structlog.get_logger()
    async with open_clients(settings) as clients:
        server = GatewayServer(
            create_app(settings, clients), host=settings.host, port=settings.port, grace_s=_GRACE_S
        )
        log.info(
            "gateway_starting",
            host=settings.host,
            port=settings.port,
            model_path=settings.model_path,
            has_api_keys=bool(settings.api_keys or settings.api_keys_file),
        )
        listeners = open_listeners(settings)
        # But for uvicorn's own handlers, which `serve` begins with: what came between would be lost.
        ignore_stop_signals()
        await server.serve(listeners)


def main() -> int:
    end_on_stop_signals()
    settings = read_settings(GatewaySettings)
    configure_logs("gateway", settings.log_level)
    warn_of_unknown_variables()
    configure_tracing("gateway")
    try:
        configure_tls()
        asyncio.run(serve(settings))
    except ConfigurationError as error:
        exit_for_configuration(error)
    except KilnError as error:
        print(f"kiln_gateway: {error} {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
