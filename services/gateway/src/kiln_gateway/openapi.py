"""The OpenAPI document, request bodies included: routes read them by hand to give Kiln's own errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kiln_gateway.schemas.adapters import AttachBody, MergeBody, RollbackBody
from kiln_gateway.schemas.batch import BatchBody
from kiln_gateway.schemas.chat import ChatCompletionBody
from kiln_gateway.schemas.completions import TextCompletionBody
from kiln_gateway.schemas.corrections import CorrectionBody
from kiln_gateway.schemas.embeddings import EmbeddingsBody
from kiln_gateway.schemas.messages import CountTokensBody, MessagesBody
from kiln_gateway.schemas.opd import OpdBody
from kiln_gateway.schemas.responses import ResponsesBody
from kiln_gateway.schemas.text import DetokenizeBody, TokenizeBody
from kiln_gateway.schemas.training import CancelBody, GrpoBody, RetryBody, SftBody

REQUEST_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionBody,
    "/v1/completions": TextCompletionBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/completions/batch": BatchBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    "/v1/tokenize": TokenizeBody,
    "/v1/detokenize": DetokenizeBody,
    "/v1/train/sft": SftBody,
    "/v1/train/grpo": GrpoBody,
    "/v1/train/opd": OpdBody,
    "/v1/train/jobs/{job_id}/cancel": CancelBody,
    "/v1/train/jobs/{job_id}/retry": RetryBody,
    "/v1/corrections": CorrectionBody,
    "/v1/adapters/{name}/attach": AttachBody,
    "/v1/adapters/{name}/rollback": RollbackBody,
    "/v1/adapters/merge": MergeBody,
}
_OPTIONAL = (AttachBody, CancelBody, RetryBody)
_REF = "#/components/schemas/{model}"


def install_openapi(app: FastAPI) -> None:
    """Make GET /openapi.json describe every request body."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = [(model, "validation") for model in REQUEST_BODIES.values()]
    _, definitions = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for path, model in REQUEST_BODIES.items():
        reference = {"$ref": _REF.format(model=model.__name__)}
        document["paths"][path]["post"]["requestBody"] = {
            "required": model not in _OPTIONAL,
            "content": {"application/json": {"schema": reference}},
        }
    return document
