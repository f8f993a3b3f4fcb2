"""Asks the engine how loaded it is, from the training thread, between two micro-batches."""

from __future__ import annotations

import grpc

from kiln_common.pb import engine_pb2, engine_pb2_grpc
from kiln_common.rpc.channel import open_blocking_channel
from kiln_trainer.domain.gpu_share import EngineLoad

_TIMEOUT_S = 0.1


class EngineLoadReader:
    """The load of the engine at "host:port" or "unix:/path"; None when it does not say so in time.

    Synchronous and on a channel of its own: it must not depend on the event loop that serves the
    trainer's clients. The channel lives as long as the reader, which is the process's life.
    """

    def __init__(self, engine_address: str, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        channel = open_blocking_channel(engine_address)
        self._engine = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]

    def __call__(self) -> EngineLoad | None:
        try:
            stats = self._engine.GetStats(engine_pb2.GetStatsRequest(), timeout=self._timeout_s)
        except grpc.RpcError:
            return None
        return EngineLoad(stats.num_running, stats.num_waiting)
