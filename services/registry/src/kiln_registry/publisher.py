"""From complete bytes to a recorded version."""

from __future__ import annotations

import time

from kiln_common.pb import registry_pb2 as pb
from kiln_registry.blobs import BlobStore, Upload
from kiln_registry.catalog import Catalog
from kiln_registry.domain import Publication, VersionRecord
from kiln_registry.inspection import inspect_adapter, parse_peft_config


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
        base_model = self._catalog.get_base_model(header.base_model_hash)
        inspected = inspect_adapter(upload.path, parse_peft_config(header.config_json), base_model)
        is_recorded = False
        try:
            with self._blobs.hold(upload) as blob:
                publication = Publication(
                    name=header.name, base_model_hash=header.base_model_hash,
                    config_json=header.config_json, blob=blob, inspected=inspected,
                    parent_name=header.parent_name, parent_version=header.parent_version,
                    job_id=header.job_id, publish_key=header.publish_key,
                    claim_epoch=header.claim_epoch, attach=header.attach,
                    metrics_json=header.metrics_json or "{}", data_sha256=header.data_sha256, merge_json=merge_json,
                )  # fmt: skip
                record = self._catalog.publish(publication, time.time())
            is_recorded = True
            return record
        finally:
            if not is_recorded:
                self._blobs.sweep(self._catalog.list_named_blobs)
