"""Which weights answer a request: the fields `model`, `adapter` and `adapters` to adapter versions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from kiln_common.adapter_names import BASE_NAME
from kiln_common.errors import AdapterMismatch, AdapterNotFound, KilnError, RegistryUnavailable
from kiln_common.pb import common_pb2, registry_pb2
from kiln_gateway.adapters.visible_adapters import VisibleAdapters
from kiln_gateway.auth import Caller
from kiln_gateway.errors import ModelNotFound
from kiln_gateway.ports import RegistryPort

log = structlog.get_logger()

_DEFAULT_TIMEOUT_S = 2.0
_NO_SUCH_ADAPTER = ("adapter_not_found", "invalid_adapter_name", "reserved_adapter_name")


@dataclass(frozen=True, slots=True)
class Target:
    """The weights of one request, fixed when it was accepted."""

    adapters: tuple[common_pb2.AdapterRef, ...] = ()

    @property
    def label(self) -> str:
        """ "name@version" (several joined by "+"), or "base"; the X-Kiln-Adapter header."""
        return adapters_label(self.adapters)


def adapters_label(adapters: Iterable[common_pb2.AdapterRef]) -> str:
    """ "name@version" (several joined by "+"), or "base"."""
    return "+".join(f"{ref.name}@{ref.version}" for ref in adapters) or BASE_NAME


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    reference: str
    scale: float = 1.0


class ModelResolver:
    """Asks the registry once per request, so that a request sent after a publish gets the new version."""

    def __init__(self, registry: RegistryPort) -> None:
        self._registry = registry
        self._knows_default = False
        self._last_default: registry_pb2.AdapterVersion | None = None
        self._ignored_default = ""

    async def resolve(
        self,
        model: str | None,
        *,
        caller: Caller,
        base_ids: frozenset[str],
        model_hash: str,
        adapter: str | None = None,
        is_adapter_given: bool = False,
        adapters: Sequence[WantedAdapter] | None = None,
    ) -> Target:
        """Turn what the request says into versions.

        `base_ids` are the names of the base model; its default adapter applies to them. The name
        "base" and `adapter: null` mean the bare base model. Other keys' adapters are not there; the default
        is for everybody. `model_hash` is the served base model's:
        adapters of another one are refused, and as the default ignored.

        Raises:
            ModelNotFound: `model` is neither the base model nor an adapter.
            AdapterNotFound: `adapter` or one of `adapters` does not exist.
            AdapterMismatch: the version belongs to another base model.
            RegistryUnavailable: the registry has to be asked and does not answer.
        """
        if adapters is not None:
            versions = await asyncio.gather(
                *(self.version(wanted.reference, model_hash, "adapters", caller) for wanted in adapters)
            )
            return Target(
                tuple(
                    _to_ref(version, wanted.scale) for version, wanted in zip(versions, adapters, strict=True)
                )
            )
        if is_adapter_given:
            if adapter is None or adapter == BASE_NAME:
                return Target()
            return Target((_to_ref(await self.version(adapter, model_hash, "adapter", caller)),))
        if model == BASE_NAME:
            return Target()
        if model is None or model in base_ids:
            default = await self._default(model_hash)
            return Target((_to_ref(default),)) if default is not None else Target()
        try:
            return Target((_to_ref(await self.version(model, model_hash, "model", caller)),))
        except AdapterNotFound as error:
            raise ModelNotFound(model) from error

    async def version(
        self, reference: str, model_hash: str, param: str, caller: Caller
    ) -> registry_pb2.AdapterVersion:
        """The version that `reference` means now to this caller. Raises AdapterNotFound, AdapterMismatch."""
        visible = VisibleAdapters(self._registry, caller)
        return await _checked(visible.resolve(reference), reference, model_hash, param)

    async def accepted(self, label: str, model_hash: str) -> Target:
        """The target that was resolved for its caller before, by its label: nobody's rights are asked again.

        A version's number is never given to another one, so the label still means the same weights.

        Raises:
            AdapterNotFound: it has been deleted since.
            AdapterMismatch: another base model is served now.
        """
        if label == BASE_NAME:
            return Target()
        found = self._registry.resolve(label)
        return Target((_to_ref(await _checked(found, label, model_hash, "adapter")),))

    async def _default(self, model_hash: str) -> registry_pb2.AdapterVersion | None:
        """The attached version, unless it belongs to another base model than the served one.

        While the registry is away nothing can be attached, so the last one holds.
        """
        try:
            # One that hangs is not waited for as long as for what only it can answer.
            async with asyncio.timeout(_DEFAULT_TIMEOUT_S if self._knows_default else None):
                self._last_default = await self._registry.get_default()
            self._knows_default = True
        except (RegistryUnavailable, TimeoutError) as error:
            if not self._knows_default:
                raise RegistryUnavailable(
                    "the registry does not answer, so the default adapter is unknown",
                    hint='Try again in a moment, or send "adapter": null for the bare base model.',
                    param="model",
                ) from error
            log.warning("registry_away_default_kept")
        default = self._last_default
        if default is None or default.base_model_hash == model_hash:
            return default
        label = f"{default.name}@{default.version}"
        if self._ignored_default != label:
            self._ignored_default = label
            log.warning(
                "default_adapter_ignored",
                adapter=label,
                made_for=default.base_model_hash[:12],
                served=model_hash[:12],
            )
        return None


async def _checked(
    finding: Awaitable[registry_pb2.AdapterVersion], reference: str, model_hash: str, param: str
) -> registry_pb2.AdapterVersion:
    """What was found, if it is of the served base model. Raises AdapterNotFound, AdapterMismatch."""
    try:
        found = await finding
    except KilnError as error:
        if error.code in _NO_SUCH_ADAPTER:
            # Clients of OpenAI's API show only the message.
            raise AdapterNotFound(
                f"there is no adapter {reference!r}; GET /v1/adapters lists those there are",
                param=param,
            ) from error
        raise
    if found.base_model_hash != model_hash:
        raise AdapterMismatch(
            f"{found.name}@{found.version} was made for the base model {found.base_model_hash[:12]}, "
            f"served is {model_hash[:12]}",
            param=param,
        )
    return found


def _to_ref(version: registry_pb2.AdapterVersion, scale: float = 1.0) -> common_pb2.AdapterRef:
    return common_pb2.AdapterRef(
        name=version.name, version=version.version, sha256=version.sha256, scale=scale
    )
