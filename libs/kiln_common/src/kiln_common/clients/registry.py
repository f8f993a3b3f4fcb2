"""Client of the registry service."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc

from kiln_common.errors import KilnError, RegistryUnavailable
from kiln_common.pb import common_pb2, registry_pb2, registry_pb2_grpc
from kiln_common.rpc import from_rpc_error, open_channel

CHUNK_BYTES = 1024 * 1024


class BlobCorrupt(KilnError):
    """The bytes that arrived are not the ones their hash names."""

    code = "blob_corrupt"
    hint = "Fetch again; if it persists, the registry's disk damaged the file: publish it anew."


class RegistryClient:
    """Typed calls to one registry; errors come back as KilnError with the registry's code.

    Every call may raise RegistryUnavailable. `timeout_s` bounds a call, `transfer_timeout_s` one
    that carries an adapter's bytes or computes with them.
    """

    def __init__(self, address: str, *, timeout_s: float = 10.0, transfer_timeout_s: float = 300.0) -> None:
        self._channel = open_channel(address)
        self._stub = registry_pb2_grpc.RegistryStub(self._channel)
        self._timeout_s = timeout_s
        self._transfer_timeout_s = transfer_timeout_s

    async def close(self) -> None:
        await self._channel.close()

    async def register_base_model(
        self, base_model: common_pb2.BaseModel, *, max_adapter_rank: int = 0
    ) -> None:
        """Announce a base model, the modules its adapters may touch and the rank they may have. Idempotent."""
        request = registry_pb2.RegisterBaseModelRequest(
            base_model=base_model, max_adapter_rank=max_adapter_rank
        )
        await self._call(self._stub.RegisterBaseModel, request)

    async def publish(
        self, header: registry_pb2.PublishHeader, safetensors: bytes | memoryview | Path
    ) -> registry_pb2.AdapterVersion:
        """Publish one version from adapter_model.safetensors, given as its bytes or as a file.

        Idempotent by header.publish_key; nothing is visible unless this returns.
        """
        try:
            return await self._stub.Publish(
                _publish_parts(header, safetensors), timeout=self._transfer_timeout_s
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, "registry", RegistryUnavailable) from error

    async def await_publish(self, name: str, sha256: str, *, timeout_s: float) -> registry_pb2.AdapterVersion:
        """The version of a name that has these bytes, as soon as the registry has committed one.

        Raises RegistryUnavailable where that took longer than `timeout_s`, too.
        """
        request = registry_pb2.AwaitPublishRequest(name=name, sha256=sha256)
        return await self._call(self._stub.AwaitPublish, request, timeout_s)

    async def check_publish(self, name: str, owner: str) -> None:
        """Raises what a publish under this name would: adapter_name_taken, and what is wrong with a name."""
        await self._call(self._stub.CheckPublish, registry_pb2.CheckPublishRequest(name=name, owner=owner))

    async def hold(self, holder: str, references: Iterable[str], *, for_s: float) -> None:
        """Keep versions from being collected; lets go of what the holder held before."""
        request = registry_pb2.HoldRequest(holder=holder, references=references, for_s=for_s)
        await self._call(self._stub.Hold, request)

    async def list_audit(
        self, *, name: str = "", before_id: int = 0, limit: int = 0
    ) -> list[registry_pb2.AuditEntry]:
        """Who did what, newest first."""
        request = registry_pb2.ListAuditRequest(name=name, before_id=before_id, limit=limit)
        return [*(await self._call(self._stub.ListAudit, request)).entries]

    async def resolve(self, reference: str) -> registry_pb2.AdapterVersion:
        """The version that "name" or "name@3" means now. Raises adapter_not_found."""
        return await self._call(self._stub.Resolve, registry_pb2.ResolveRequest(reference=reference))

    async def get(self, name: str) -> registry_pb2.Adapter:
        """A name with all its versions. Raises adapter_not_found."""
        return await self._call(self._stub.GetAdapter, registry_pb2.GetAdapterRequest(name=name))

    async def list(self) -> list[registry_pb2.Adapter]:
        """Every name with its versions, in order of the names."""
        answer = await self._call(self._stub.ListAdapters, registry_pb2.ListAdaptersRequest())
        return [*answer.adapters]

    async def fetch(self, sha256: str) -> bytes:
        """The bytes of adapter_model.safetensors, checked against their hash.

        Raises:
            BlobCorrupt: they do not match. Also blob_not_found (remote).
        """
        # Hashed beside the transfer, on a thread: it takes as long, and others wait for this loop.
        parts: list[bytes] = []
        digest = hashlib.sha256()
        hashing: asyncio.Task[None] | None = None
        try:
            async for answer in self._stub.Fetch(
                registry_pb2.FetchRequest(sha256=sha256), timeout=self._transfer_timeout_s
            ):
                parts.append(answer.chunk)
                if hashing is not None:
                    await hashing
                hashing = asyncio.create_task(asyncio.to_thread(digest.update, answer.chunk))
        except grpc.RpcError as error:
            raise from_rpc_error(error, "registry", RegistryUnavailable) from error
        finally:
            if hashing is not None:
                await hashing
        content = await asyncio.to_thread(b"".join, parts)
        found = digest.hexdigest()
        if found != sha256:
            raise BlobCorrupt(f"asked for the bytes {sha256}, got {len(content)} bytes of hash {found}")
        return content

    async def set_default(self, reference: str, *, actor: str = "") -> registry_pb2.AdapterVersion | None:
        """Attach a version as the deployment's default; an empty reference detaches (None)."""
        request = registry_pb2.SetDefaultRequest(reference=reference, actor=actor)
        answer = await self._call(self._stub.SetDefault, request)
        return answer.attached if answer.HasField("attached") else None

    async def get_default(self) -> registry_pb2.AdapterVersion | None:
        """The attached version, or None."""
        answer = await self._call(self._stub.GetDefault, registry_pb2.GetDefaultRequest())
        return answer.attached if answer.HasField("attached") else None

    async def roll_back(
        self, name: str, version: int, *, may_move_default: bool, actor: str = ""
    ) -> registry_pb2.RollBackResponse:
        """Let a bare name mean an earlier version again, and the default where it is a later one.

        Raises default_needs_admin where the default would move and may not, and adapter_not_found.
        """
        request = registry_pb2.RollBackRequest(
            name=name, version=version, may_move_default=may_move_default, actor=actor
        )
        return await self._call(self._stub.RollBack, request)

    async def compare(self, earlier: str, later: str) -> registry_pb2.CompareResponse:
        """How two versions ("name" or "name@3") differ; an empty `earlier` is the bare base model."""
        request = registry_pb2.CompareRequest(earlier=earlier, later=later)
        return await self._call(self._stub.Compare, request, self._transfer_timeout_s)

    async def merge(self, request: registry_pb2.MergeRequest) -> registry_pb2.AdapterVersion:
        """A new version out of several. Idempotent by request.publish_key."""
        return await self._call(self._stub.Merge, request, self._transfer_timeout_s)

    async def delete(self, name: str, version: int = 0, *, actor: str = "") -> int:
        """Delete a version, or all of the name (version 0); returns how many.

        Raises adapter_in_use while one of them is attached, and adapter_not_found.
        """
        request = registry_pb2.DeleteVersionRequest(name=name, version=version, actor=actor)
        return (await self._call(self._stub.DeleteVersion, request)).num_deleted

    async def _call(self, method: Any, request: Any, timeout_s: float = 0.0) -> Any:
        try:
            return await method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "registry", RegistryUnavailable) from error


async def _publish_parts(
    header: registry_pb2.PublishHeader, safetensors: bytes | memoryview | Path
) -> AsyncIterator[registry_pb2.PublishRequest]:
    yield registry_pb2.PublishRequest(header=header)
    if not isinstance(safetensors, Path):
        for start in range(0, len(safetensors), CHUNK_BYTES):
            yield registry_pb2.PublishRequest(chunk=bytes(safetensors[start : start + CHUNK_BYTES]))
        return
    with safetensors.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield registry_pb2.PublishRequest(chunk=chunk)
