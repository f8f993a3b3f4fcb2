"""`python -m kiln_registry`: the registry process."""

from __future__ import annotations

import asyncio

from kiln_common.logs import configure_logs
from kiln_common.rpc.server import wait_for_stop_signal
from kiln_registry.bootstrap import start_registry
from kiln_registry.settings import RegistrySettings


async def serve(settings: RegistrySettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    registry = await start_registry(settings)
    try:
        await wait_for_stop_signal()
    finally:
        await registry.stop()


def main() -> None:
    settings = RegistrySettings()  # type: ignore[call-arg]  # fields come from the environment
    configure_logs("registry", settings.log_level)
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
