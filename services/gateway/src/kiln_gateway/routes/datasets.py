"""Datasets: uploaded as JSONL, listed, sampled, deleted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_common.pb import dataset_pb2
from kiln_gateway.auth import Caller, require
from kiln_gateway.datasets.reading import DatasetReader
from kiln_gateway.datasets.upload import receive_dataset
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.request_query import refuse_unknown_query

router = APIRouter(prefix="/v1/datasets")
_TRAIN = Depends(require("train"))
_KNOWN_QUERY = Depends(refuse_unknown_query)


def dataset_object(dataset: dataset_pb2.Dataset) -> dict[str, Any]:
    return {
        "id": dataset.id,
        "object": "dataset",
        "name": dataset.name or None,
        "format": dataset.format,
        "rows": dataset.num_rows,
        "bytes": dataset.num_bytes,
        "sha256": dataset.sha256,
        "created_at": dataset.created_at_s,
    }


def _reader(request: Request, caller: Caller) -> DatasetReader:
    return DatasetReader(gateway_of(request).clients.datasets, caller)


@router.post("", status_code=201, dependencies=[_KNOWN_QUERY])
async def upload_dataset(
    request: Request,
    name: str = Query("", max_length=256),
    format: str = Query("", max_length=40),
    caller: Caller = _TRAIN,
) -> Response:
    """Keep the lines of the body (or of the form's `file`), each of them a row; a broken one refuses all."""
    gateway = gateway_of(request)
    with tempfile.TemporaryDirectory(prefix="kiln-dataset-") as folder:
        limit_bytes = gateway.settings.max_upload_bytes
        upload = await receive_dataset(request, Path(folder), limit_bytes, name, format)
        # What was uploaded before is found by its bytes; a key only says that it has to be the same.
        key, _ = await gateway.idempotency.find(request, caller.owner, upload.sha256)
        header = dataset_pb2.DatasetHeader(
            owner=caller.owner,
            name=upload.name,
            format=upload.format,
            num_rows=upload.num_rows,
            sha256=upload.sha256,
        )
        kept = await gateway.clients.datasets.put(header, upload.path)
        await gateway.idempotency.remember(request, key, kept.id, upload.sha256)
    return json_response(dataset_object(kept), status=200 if kept.is_repeat else 201)


@router.get("")
async def list_datasets(request: Request, caller: Caller = _TRAIN) -> Response:
    """The newest datasets first."""
    found = await _reader(request, caller).visible()
    return json_response({"object": "list", "data": [dataset_object(dataset) for dataset in found]})


@router.get("/{dataset_id}")
async def get_dataset(request: Request, dataset_id: str, caller: Caller = _TRAIN) -> Response:
    """One dataset: format, rows, bytes, hash."""
    return json_response(dataset_object(await _reader(request, caller).find(dataset_id)))


@router.get("/{dataset_id}/sample", dependencies=[_KNOWN_QUERY])
async def sample_dataset(
    request: Request,
    dataset_id: str,
    n: int = Query(5, ge=1, le=1000),
    seed: int = Query(0, ge=0, lt=2**63),
    caller: Caller = _TRAIN,
) -> Response:
    """Some rows, drawn at random, in their order and with their lines' numbers."""
    reader = _reader(request, caller)
    rows = await reader.sample(await reader.find(dataset_id), n, seed)
    return json_response({"object": "list", "data": rows})


@router.delete("/{dataset_id}")
async def delete_dataset(request: Request, dataset_id: str, caller: Caller = _TRAIN) -> Response:
    """Forget a dataset; jobs that were made of it keep their own copy."""
    await _reader(request, caller).find(dataset_id)
    await gateway_of(request).clients.datasets.delete(dataset_id)
    return json_response({"id": dataset_id, "object": "dataset", "deleted": True})
