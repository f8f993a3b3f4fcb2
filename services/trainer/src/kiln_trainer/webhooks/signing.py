"""The message of a webhook, signed as Standard Webhooks has it (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from typing import Any

from kiln_common.pb import trainer_pb2

_KEY_PREFIX = "whsec_"


def message(job: trainer_pb2.Job) -> bytes:
    """What a webhook says of an ended job."""
    error, result = None, None
    if job.error.code:
        error = {"code": job.error.code, "message": job.error.message, "hint": job.error.hint}
    if job.HasField("result"):
        result = {
            "adapter": job.result.adapter,
            "version": job.result.version,
            "sha256": job.result.sha256,
            "not_live": list(job.result.not_live),
        }
    data: dict[str, Any] = {
        "id": job.id,
        "object": "training.job",
        "kind": job.kind,
        "status": job.status,
        "adapter": job.config.adapter,
        "result": result,
        "error": error,
        "metrics": dict(job.metrics),
        "metadata": json.loads(job.config.metadata_json or "{}"),
        "retry_of": job.retry_of or None,
        "created_at": job.created_at_s,
        "started_at": job.started_at_s or None,
        "finished_at": job.finished_at_s,
    }
    body = {"type": f"training.job.{job.status}", "timestamp": job.finished_at_s, "data": data}
    return json.dumps(body).encode()


def signed_headers(message_id: str, body: bytes, secret: str, now_s: int) -> dict[str, str]:
    """The three headers by which a receiver knows sender, time and message.

    The signature is HMAC-SHA256 over "id.timestamp.body". A secret "whsec_…" is the key in base64, any
    other is the key itself.
    """
    content = f"{message_id}.{now_s}.".encode() + body
    signature = hmac.new(_key(secret), content, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(now_s),
        "webhook-signature": "v1," + base64.b64encode(signature).decode(),
    }


def _key(secret: str) -> bytes:
    if secret.startswith(_KEY_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(_KEY_PREFIX), validate=True)
        except binascii.Error:
            pass  # it only begins like one
    return secret.encode()
