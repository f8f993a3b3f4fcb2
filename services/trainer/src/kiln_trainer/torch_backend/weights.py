"""The engine's base weights, mapped into this process and proven to be borrowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc
import torch

from kiln_common.pb import engine_pb2, engine_pb2_grpc
from kiln_common.rpc import details_of
from kiln_common.rpc.channel import open_blocking_channel
from kiln_nn.blocks import Weights
from kiln_nn.config import ModelConfig
from kiln_nn.errors import ShareRefused
from kiln_nn.sharing import SharedWeights, attach
from kiln_nn.weights import ArenaReader
from kiln_nn.weights.names import HEAD, expected_tensors
from kiln_trainer.domain.errors import WeightsLost
from kiln_trainer.torch_backend.errors import WeightsNotBorrowed

_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class WeightLocation:
    """Where an engine hands out its weights, and whose they are."""

    socket_path: str
    boot_id: str
    model_hash: str
    model_id: str  # as clients address it; goes into adapter_config.json


LocateWeights = Callable[[], WeightLocation]
"""Asks the engine; raises WeightsLost if it does not answer. Called from the training thread."""


def engine_locator(engine_address: str, timeout_s: float = _CALL_TIMEOUT_S) -> LocateWeights:
    """Ask the engine at "host:port" or "unix:/path".

    The call is synchronous on a channel of its own: it is made from the training thread, and
    must not depend on the event loop that serves the trainer's clients.
    """

    def locate() -> WeightLocation:
        with open_blocking_channel(engine_address) as channel:
            engine = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]
            try:
                info = engine.GetInfo(engine_pb2.GetInfoRequest(), timeout=timeout_s)
                share = engine.ShareWeights(engine_pb2.ShareWeightsRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                raise WeightsLost(f"the engine did not answer: {details_of(error)}") from error
        return WeightLocation(share.socket_path, share.boot_id, share.model_hash, info.base_model.model_id)

    return locate


class WeightSession:
    """One mapping of one engine's weights; it ends with that engine's life.

    `device`: where to train, if not where the engine's weights lie: all of them are copied there, once
    and as one piece, and the mapping goes on to say that the engine lives.

    Raises:
        WeightsNotBorrowed: a parameter is missing from the mapping or lies outside it.
    """

    def __init__(self, shared: SharedWeights, model_id: str, device: torch.device | None = None) -> None:
        self._shared = shared
        self._arena: ArenaReader | None = shared
        self.is_own_device = device is not None and device != shared.bytes_u8().device
        if self.is_own_device:
            self._arena = ArenaReader(shared.manifest, shared.bytes_u8().to(device))
        self.model_id = model_id
        self.weights: Weights = self._arena.views()
        self.num_borrowed_bytes = sum(
            entry.nbytes for entry in shared.manifest.entries if entry.kind != "alias"
        )
        # Where the weights lie that training reads, and so where it runs; and their format.
        first = next(iter(self.weights.values()))
        self.device, self.weights_dtype = first.device, first.dtype
        self.check_borrowed(self.weights)

    @classmethod
    def open(cls, locate: LocateWeights, device: torch.device | None = None) -> WeightSession:
        """Find the engine and map its weights, and copy them if training runs on another device.

        Raises:
            WeightsLost: the engine is away, or was replaced between the two questions.
            KilnNnError: the weights cannot be shared on this machine.
        """
        location = locate()
        try:
            shared = attach(location.socket_path, expected_boot_id=location.boot_id)
        except ShareRefused as error:
            raise WeightsLost(f"the engine's weights could not be mapped: {error}") from error
        try:
            return cls(shared, location.model_id, device)
        except BaseException:
            shared.close()
            raise

    @property
    def config(self) -> ModelConfig:
        return self._shared.manifest.config

    @property
    def model_hash(self) -> str:
        return self._shared.manifest.model_hash

    @property
    def boot_id(self) -> str:
        return self._shared.manifest.boot_id

    def num_allocated_base_bytes(self, weights: Weights) -> int:
        """Bytes of the base model that this process holds itself: 0, or one copy on a device of its own."""
        copied = self._shared.manifest.nbytes if self.is_own_device else 0
        return copied + self._reader.num_foreign_bytes(weights)

    def check_borrowed(self, weights: Weights) -> None:
        """Check by address that `weights` are all of the model's parameters, and all in the mapping.

        On a device of its own: all in the one copy.

        Raises:
            WeightsNotBorrowed: one is missing, or lies outside.
        """
        expected = set(expected_tensors(self.config, include_mtp=True)) | {HEAD}
        foreign = sorted(expected - weights.keys())
        foreign += [name for name, tensor in weights.items() if not self._reader.borrows(tensor)]
        if foreign:
            raise WeightsNotBorrowed(foreign, self.num_allocated_base_bytes(weights))

    def check_alive(self) -> None:
        """Raises WeightsLost if the engine has gone: its memory may already hold something else."""
        if not self._shared.is_alive():
            raise WeightsLost(f"the engine of boot {self.boot_id} is gone")

    def is_alive(self) -> bool:
        """Whether the engine still serves these weights."""
        return self._shared.is_alive()

    def checksum(self) -> str:
        """Hex sha256 of the bytes that training reads, computed now."""
        return self._reader.checksum()

    def close(self) -> None:
        """Give the lease back. Idempotent; nothing may use `weights` afterwards."""
        self.weights = {}
        self._arena = None
        self._shared.close()

    @property
    def _reader(self) -> ArenaReader:
        assert self._arena is not None, "the session was closed"
        return self._arena
