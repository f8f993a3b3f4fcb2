"""Adapter bytes on disk, under their sha256: written aside, synced, then renamed into place."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

from kiln_registry.domain import AdapterTooLarge, BlobNotFound, Sha256Mismatch, StoredBlob

_SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK_BYTES = 1024 * 1024
_SYNCERS = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="sync-blob")


class BlobStore:
    """Owns `folder`: blobs/<first two digits>/<sha256>, and uploads/ for what is not complete yet.

    Thread-safe. A blob that no version names is an orphan: a publish failed after its bytes were
    stored, or its version was deleted. Blobs a publish is about to name are held and not swept.
    """

    def __init__(self, folder: Path, *, max_blob_bytes: int) -> None:
        self._blobs = folder / "blobs"
        self._uploads = folder / "uploads"
        self._max_blob_bytes = max_blob_bytes
        self._lock = threading.Lock()
        self._num_holds: dict[str, int] = {}
        for path in (self._blobs, self._uploads):
            path.mkdir(parents=True, exist_ok=True)

    def begin_upload(self) -> Upload:
        """Room for bytes that are arriving; close it whatever happens."""
        return Upload(self._uploads, self._max_blob_bytes)

    @contextlib.contextmanager
    def hold(self, upload: Upload) -> Iterator[StoredBlob]:
        """Put a complete upload in place, and keep it there until the block ends.

        The block records a version that names the blob; should it not, the next sweep takes it.
        """
        sha256 = upload.sha256
        with self._lock:
            self._num_holds[sha256] = self._num_holds.get(sha256, 0) + 1
        try:
            target = self._path(sha256)
            # Also over bytes that are there: the disk may have damaged them since.
            upload.move_to(target)
            yield StoredBlob(sha256, target.stat().st_size)
        finally:
            with self._lock:
                self._num_holds[sha256] -= 1
                if not self._num_holds[sha256]:
                    del self._num_holds[sha256]

    def open_path(self, sha256: str) -> Path:
        """Where the bytes are. Raises BlobNotFound."""
        if not _SHA256.fullmatch(sha256) or not self._path(sha256).is_file():
            raise BlobNotFound(sha256)
        return self._path(sha256)

    def sweep(self, read_named: Callable[[], set[str]]) -> int:
        """Remove every blob that is neither named nor held; returns how many.

        `read_named` reads the hashes that live versions name. It is called with holds blocked, so
        that a version recorded under a hold is seen either in its answer or by its hold.
        """
        num_removed = 0
        with self._lock:
            keep = read_named() | self._num_holds.keys()
            for path in self._blobs.glob("*/*"):
                if path.name not in keep:
                    path.unlink(missing_ok=True)
                    num_removed += 1
        return num_removed

    def remove_abandoned_uploads(self) -> None:
        """Delete what a crash left half-received; call before any upload begins."""
        for path in self._uploads.iterdir():
            path.unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256


class Upload:
    """Bytes being received into a temporary file, hashed as they come."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._file = NamedTemporaryFile(dir=folder, delete=False)  # noqa: SIM115 lives until close()
        self._hash = hashlib.sha256()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._syncing: concurrent.futures.Future[None] | None = None
        self.path = Path(self._file.name)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, chunk: bytes | memoryview) -> None:
        """Append. Raises AdapterTooLarge."""
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            raise AdapterTooLarge(f"the adapter has more than {self._max_bytes} bytes")
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self, expected_sha256: str) -> None:
        """Nothing more comes: begin to sync the file. Raises Sha256Mismatch unless the expectation is empty or met."""
        self._file.flush()
        # The bytes are looked at meanwhile.
        self._syncing = _SYNCERS.submit(os.fsync, self._file.fileno())
        if expected_sha256 and self.sha256 != expected_sha256.lower():
            raise Sha256Mismatch(
                f"{self._num_bytes} bytes arrived with the hash {self.sha256}, "
                f"{expected_sha256[:64]} was announced"
            )

    def move_to(self, target: Path) -> None:
        """Put the file in place once it is synced; `finish` comes before."""
        assert self._syncing is not None
        self._syncing.result()
        target.parent.mkdir(exist_ok=True)
        os.replace(self.path, target)
        for folder in (target.parent, target.parent.parent):
            _sync_folder(folder)

    def close(self) -> None:
        """Delete the temporary file unless it has been moved into place."""
        if self._syncing is not None:
            concurrent.futures.wait([self._syncing])  # it needs the descriptor
        with contextlib.suppress(OSError):  # a full disk does not take the rest of its buffer
            self._file.close()
        self.path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
