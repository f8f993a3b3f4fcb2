"""Merges stored versions into a new one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from kiln_common.adapter_names import AdapterReference
from kiln_common.errors import AdapterMismatch
from kiln_common.pb import registry_pb2 as pb
from kiln_registry.adapter_file import AdapterFile
from kiln_registry.blobs import CHUNK_BYTES, BlobStore
from kiln_registry.catalog import Catalog
from kiln_registry.comparison import in_model_order
from kiln_registry.domain import (
    BaseModelRecord,
    InvalidMerge,
    MergeRanksDiffer,
    MergeRankTooHigh,
    VersionRecord,
    is_draft,
)
from kiln_registry.inspection import MAX_RANK
from kiln_registry.merging import MODES, merge_updates
from kiln_registry.publisher import Publisher

MAX_SOURCES = 16


class Merger:
    """Reads the sources' files, computes, and publishes the result; blocks."""

    def __init__(self, catalog: Catalog, blobs: BlobStore, publisher: Publisher) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._publisher = publisher

    def merge(self, request: pb.MergeRequest) -> VersionRecord:
        """Publish what the sources make together, with its lineage. Idempotent by publish_key.

        Raises:
            InvalidMerge: no sources or too many, a weight that is 0 or not finite, an unknown mode.
            AdapterMismatch: the sources belong to different base models.
            MergeRanksDiffer, MergeRankTooHigh: the result would have no rank, or one too high.
        """
        _check_request(request)
        self._catalog.check_name(request.output)
        made_before = self._catalog.find_published(request.publish_key, request.output, "", 0)
        if made_before is not None:
            return made_before
        self._catalog.check_publish(request.output, request.owner, time.time())
        records = [
            self._catalog.resolve(AdapterReference(source.name, source.version)) for source in request.sources
        ]
        base_model = self._catalog.get_base_model(_common_base_model(records))
        rank = _merged_rank(request.mode, [record.rank for record in records], base_model)
        tensors = self._compute(request, records, rank)
        header = pb.PublishHeader(
            name=request.output,
            base_model_hash=base_model.model_hash,
            config_json=_config_json(tensors, rank, base_model),
            publish_key=request.publish_key,
            owner=request.owner,
        )
        content = memoryview(_serialise(tensors))
        with self._blobs.begin_upload() as upload:
            for start in range(0, len(content), CHUNK_BYTES):
                upload.write(content[start : start + CHUNK_BYTES])
            return self._publisher.publish(header, upload, merge_json=_lineage(request))

    def _compute(
        self, request: pb.MergeRequest, records: Sequence[VersionRecord], rank: int
    ) -> dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Module path -> (A [rank, in], B [out, rank])."""
        files = [
            AdapterFile(self._blobs.open_path(record.sha256), record.alpha / record.rank)
            for record in records
        ]
        weights = [source.weight for source in request.sources]
        merged = {}
        for path in in_model_order({path for file in files for path in file.module_paths}):
            found = [(file.read(path), weight) for file, weight in zip(files, weights, strict=True)]
            updates = [(update, weight) for update, weight in found if update is not None]
            a_rI, b_Or = merge_updates(
                request.mode,
                [update for update, _ in updates],
                [weight for _, weight in updates],
                density=request.density,
                rank=rank,
            )
            merged[path] = a_rI.astype(np.float32), b_Or.astype(np.float32)
        return merged


def _check_request(request: pb.MergeRequest) -> None:
    if request.mode not in MODES:
        raise InvalidMerge(f"the mode is {request.mode[:40]!r}, known are {', '.join(MODES)}", param="mode")
    if not 1 <= len(request.sources) <= MAX_SOURCES:
        raise InvalidMerge(
            f"there are {len(request.sources)} sources, 1 to {MAX_SOURCES} are merged", param="sources"
        )
    for source in request.sources:
        if not math.isfinite(source.weight) or source.weight == 0:
            raise InvalidMerge(f"{source.name} has the weight {source.weight}", param="sources")
    if request.mode == "ties" and not 0 < request.density <= 1:
        raise InvalidMerge(f"density is {request.density}, it must be above 0 and up to 1", param="density")


def _common_base_model(records: Sequence[VersionRecord]) -> str:
    first = records[0]
    for record in records:
        if record.base_model_hash != first.base_model_hash:
            raise AdapterMismatch(
                f"{record.name}@{record.version} was made for the base model {record.base_model_hash[:12]}, "
                f"{first.name}@{first.version} for {first.base_model_hash[:12]}",
                param="sources",
            )
    return first.base_model_hash


def _merged_rank(mode: str, ranks: Sequence[int], base_model: BaseModelRecord) -> int:
    if mode == "concat":
        limit = base_model.max_adapter_rank or MAX_RANK
        if sum(ranks) > limit:
            raise MergeRankTooHigh(ranks, limit)
        return sum(ranks)
    if len({*ranks}) > 1:
        raise MergeRanksDiffer(f"the sources have the ranks {', '.join(map(str, ranks))}", param="sources")
    return ranks[0]


def _config_json(paths: Mapping[str, object], rank: int, base_model: BaseModelRecord) -> str:
    """adapter_config.json: by the layers' own names where they are complete, else by whole paths."""
    drafts = [path for path in paths if is_draft(path)]
    names = {path.rpartition(".")[2] for path in paths if not is_draft(path)}
    is_complete = all(
        path in paths
        for path in base_model.modules
        if path.rpartition(".")[2] in names and not is_draft(path)
    )
    fields = {
        "base_model_name_or_path": base_model.model_id,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": [*sorted(names), *drafts] if is_complete else [*paths],
        "task_type": "CAUSAL_LM",
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _serialise(
    tensors: Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
) -> bytes:
    stored = {
        f"base_model.model.{path}.lora_{side}.weight": np.ascontiguousarray(matrix)
        for path, matrices in tensors.items()
        for side, matrix in zip("AB", matrices, strict=True)
    }
    return save(stored, metadata={"format": "pt"})


def _lineage(request: pb.MergeRequest) -> str:
    sources = [
        {"name": source.name, "version": source.version, "weight": source.weight}
        for source in request.sources
    ]
    return json.dumps({"mode": request.mode, "sources": sources})
