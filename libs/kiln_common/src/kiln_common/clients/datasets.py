"""Client of the registry's datasets."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from kiln_common.clients.registry import CHUNK_BYTES
from kiln_common.errors import RegistryUnavailable
from kiln_common.pb import dataset_pb2, dataset_pb2_grpc
from kiln_common.rpc import from_rpc_error, open_channel


class DatasetClient:
    """Typed calls to one registry; errors come back as KilnError with the registry's code.

    Every call may raise RegistryUnavailable. `timeout_s` bounds a call, `transfer_timeout_s` one
    that carries a dataset's bytes.
    """

    def __init__(self, address: str, *, timeout_s: float = 10.0, transfer_timeout_s: float = 300.0) -> None:
        self._channel = open_channel(address)
        self._stub = dataset_pb2_grpc.DatasetsStub(self._channel)
        self._timeout_s = timeout_s
        self._transfer_timeout_s = transfer_timeout_s

    async def close(self) -> None:
        await self._channel.close()

    async def put(self, header: dataset_pb2.DatasetHeader, path: Path) -> dataset_pb2.Dataset:
        """Keep a file; nothing is visible unless this returns."""
        try:
            return await self._stub.Put(_parts(header, path), timeout=self._transfer_timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "registry", RegistryUnavailable) from error

    async def get(self, dataset_id: str) -> dataset_pb2.Dataset:
        """Raises dataset_not_found."""
        return await self._call(self._stub.Get, dataset_pb2.GetDatasetRequest(id=dataset_id))

    async def list(self, owner: str | None = None) -> builtins.list[dataset_pb2.Dataset]:
        """The newest first, those of one owner or all."""
        answer = await self._call(self._stub.List, dataset_pb2.ListDatasetsRequest(owner=owner))
        return [*answer.datasets]

    async def fetch(self, dataset_id: str) -> AsyncIterator[bytes]:
        """The bytes in pieces. Raises dataset_not_found, blob_not_found."""
        request = dataset_pb2.FetchDatasetRequest(id=dataset_id)
        try:
            async for answer in self._stub.Fetch(request, timeout=self._transfer_timeout_s):
                yield answer.chunk
        except grpc.RpcError as error:
            raise from_rpc_error(error, "registry", RegistryUnavailable) from error

    async def delete(self, dataset_id: str) -> None:
        """Raises dataset_not_found."""
        await self._call(self._stub.Delete, dataset_pb2.DeleteDatasetRequest(id=dataset_id))

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "registry", RegistryUnavailable) from error


async def _parts(
    header: dataset_pb2.DatasetHeader, path: Path
) -> AsyncIterator[dataset_pb2.PutDatasetRequest]:
    yield dataset_pb2.PutDatasetRequest(header=header)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield dataset_pb2.PutDatasetRequest(chunk=chunk)
