"""The trainer's side of an adapter's handover: its file in sealed memory, to be read by others."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from kiln_nn.errors import ShareRefused
from kiln_nn.lora.packed_file import PackedAdapter
from kiln_nn.lora.spec import LoraSpec
from kiln_nn.sharing.wire import check_peer, peer_uid, receive_message, send_message, socket_address
from kiln_nn.weights.host_memory import HostMemory


class SealedAdapter:
    """Both files of an adapter; the weights in a memfd that nobody can change.

    Raises:
        InvalidAdapter: no tensors, a rank other than the spec's, or a value that is not finite.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        spec: LoraSpec,
        base_model_name: str,
    ) -> None:
        packed = PackedAdapter(tensors, spec, base_model_name)
        self.config_json = packed.config_json
        self._memory = HostMemory(packed.nbytes)
        try:
            packed.write_to(self._memory.writable_u8())
            self._memory.seal()
        except BaseException:
            self._memory.close()
            raise

    def view(self) -> memoryview:
        """The bytes of adapter_model.safetensors."""
        return self._memory.readonly_u8().numpy().data

    def hand_over(self, socket_path: str, name: str, timeout_s: float) -> str:
        """Give the bytes to the engine that listens there; returns the sha256 of what it took.

        Raises:
            ShareRefused: nobody listens there, it is another user, or it did not take them.
        """
        message = {"name": name, "config_json": self.config_json, "nbytes": self._memory.nbytes}
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout_s)
                with socket_address(Path(socket_path)) as address:
                    connection.connect(address)
                check_peer(peer_uid(connection))
                send_message(connection, message, self._memory.fd)
                answer, _ = receive_message(connection)
        except OSError as error:
            raise ShareRefused(f"no engine took the adapter on {socket_path}: {error}") from error
        if "sha256" not in answer:
            raise ShareRefused(f"{answer.get('error')} ({answer.get('code')})")
        return str(answer["sha256"])

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        self._memory.close()
