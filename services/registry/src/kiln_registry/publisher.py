"""From complete bytes to a recorded version."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from safetensors.numpy import save

from kiln_common.pb import registry_pb2 as pb
from kiln_registry.blobs import CHUNK_BYTES, BlobStore, Upload
from kiln_registry.catalog import Catalog
from kiln_registry.domain import InspectedAdapter, Publication, VersionRecord
from kiln_registry.inspection import inspect_adapter, parse_peft_config
from kiln_registry.plain_form import to_plain_form
from kiln_registry.safetensors_header import read_stamped


class Publisher:
    """Checks and records uploads; thread-safe."""

    def __init__(self, catalog: Catalog, blobs: BlobStore) -> None:
        self._catalog = catalog
        self._blobs = blobs

    def publish(self, header: pb.PublishHeader, upload: Upload, *, merge_json: str = "") -> VersionRecord:
        """Check the bytes, store them and record the version; nothing is left of one that is refused."""
        upload.finish(header.sha256)
        # A repeat is answered without a second look at its bytes, which need not be the same ones.
        made_before = self._catalog.find_published(
            header.publish_key, header.name, header.job_id, header.claim_epoch
        )
        if made_before is not None:
            return made_before
        self._catalog.check_publish(header.name, header.owner, time.time())
        base_model = self._catalog.get_base_model(header.base_model_hash)
        with self._in_plain_form(header, upload) as (config_json, plain):
            inspected = inspect_adapter(plain.path, parse_peft_config(config_json), base_model)
            with self._made_distinct(plain, inspected) as distinct:
                return self._record(
                    header, config_json, distinct, inspected,
                    source_sha256=upload.sha256, merge_json=merge_json,
                )  # fmt: skip

    @contextlib.contextmanager
    def _in_plain_form(self, header: pb.PublishHeader, upload: Upload) -> Iterator[tuple[str, Upload]]:
        """Config and bytes as engines load them; the upload itself where it is plain already."""
        form = to_plain_form(header.config_json, upload.path)
        if form.tensors is None:
            yield form.config_json, upload
            return
        with self._blobs.begin_upload() as plain:
            content = memoryview(save(form.tensors, metadata={"format": "pt"}))
            for start in range(0, len(content), CHUNK_BYTES):
                plain.write(content[start : start + CHUNK_BYTES])
            plain.finish("")
            yield form.config_json, plain

    @contextlib.contextmanager
    def _made_distinct(self, upload: Upload, inspected: InspectedAdapter) -> Iterator[Upload]:
        """Bytes that no version has with another scaling: engines know an adapter by the hash of its bytes."""
        scaling = inspected.alpha / inspected.rank
        if not self._catalog.has_other_scaling(upload.sha256, scaling):
            yield upload
            return
        with self._blobs.begin_upload() as stamped:
            for chunk in read_stamped(upload.path, "kiln_scaling", repr(scaling), CHUNK_BYTES):
                stamped.write(chunk)
            stamped.finish("")
            yield stamped

    def _record(
        self,
        header: pb.PublishHeader,
        config_json: str,
        upload: Upload,
        inspected: InspectedAdapter,
        *,
        source_sha256: str,
        merge_json: str,
    ) -> VersionRecord:
        is_recorded = False
        try:
            with self._blobs.hold(upload) as blob:
                publication = Publication(
                    name=header.name, base_model_hash=header.base_model_hash,
                    config_json=config_json, blob=blob, inspected=inspected,
                    parent_name=header.parent_name, parent_version=header.parent_version,
                    job_id=header.job_id, publish_key=header.publish_key,
                    claim_epoch=header.claim_epoch, attach=header.attach,
                    metrics_json=header.metrics_json or "{}", data_sha256=header.data_sha256,
                    merge_json=merge_json, source_sha256=source_sha256, owner=header.owner,
                )  # fmt: skip
                record = self._catalog.publish(publication, time.time())
            is_recorded = True
            return record
        finally:
            if not is_recorded or self._catalog.retention.keep_versions:
                self._blobs.sweep(self._catalog.list_named_blobs)
