"""Which ids a base model may be served under: none that requests read as something else."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from kiln_common.adapter_names import BASE_NAME, InvalidAdapterName, parse_reference
from kiln_common.errors import ErrorKind
from kiln_common.settings import ConfigurationError


class ReservedModelId(ConfigurationError):
    """The base model's id already means something else in the API."""

    code = "reserved_model_id"
    kind = ErrorKind.INVALID_REQUEST
    hint = "Give the model another id: kiln up --served-model-name ID, or KILN_ENGINE_SERVED_MODEL_NAME=ID."


def check_base_model_id(model_id: str) -> None:
    """Raises ReservedModelId for "base", in any case as for adapters' names, and for "name@3"."""
    if reason := _meaning(model_id):
        raise ReservedModelId(f"{model_id!r} cannot be the base model's id: it {reason}")


def _meaning(model_id: str) -> str:
    if model_id.lower() == BASE_NAME:
        return "means the bare base model, without the default adapter"
    try:
        is_version = parse_reference(model_id).version is not None
    except InvalidAdapterName:
        return ""
    return "means a version of an adapter" if is_version else ""


def _unreserved(value: str) -> str:
    if reason := _meaning(value):
        raise ValueError(f"Value {reason}; give the base model another id")
    return value


# Of settings; empty leaves the id to whoever knows the model.
ServedModelName = Annotated[str, AfterValidator(_unreserved)]
