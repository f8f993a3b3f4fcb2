"""A job that has ended, as a new one."""

from __future__ import annotations

from google.protobuf.message import Message

from kiln_common.errors import JobNotEnded
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.errors import InvalidJobConfig
from kiln_trainer.jobs.records import FINAL_STATUSES

_START_PATHS = ("base_adapter", "start_fresh")


def retried(
    job: trainer_pb2.Job, accepted: trainer_pb2.SubmitRequest, retry: trainer_pb2.RetryJobRequest
) -> trainer_pb2.SubmitRequest:
    """The request of the job that does `job` again; `accepted` is what `job` was made of.

    It starts from the version that `job` started from, whatever was published meanwhile, unless the
    changes name another: so the same settings on the same data give the same adapter.

    Raises:
        JobNotEnded: `job` still runs or waits.
        InvalidJobConfig: a path names no setting.
    """
    if job.status not in FINAL_STATUSES:
        raise JobNotEnded(f"{job.id} is {job.status}")
    again = trainer_pb2.SubmitRequest()
    again.CopyFrom(accepted)
    changed = retry.changed.paths
    if job.started_at_s and not any(path in _START_PATHS for path in changed):
        again.config.base_adapter = job.resolved_base_adapter
        again.config.start_fresh = not job.resolved_base_adapter
    for path in changed:
        _copy(path, retry.changes, again.config)
    again.idempotency_key = retry.idempotency_key
    again.owner = retry.owner
    again.retry_of = job.id
    if retry.HasField("webhook"):
        again.ClearField("webhook")
        if retry.webhook.url:
            again.webhook.CopyFrom(retry.webhook)
    return again


def _copy(path: str, source: Message, target: Message) -> None:
    """Make the field at a dotted path of `target` what it is in `source`."""
    *parents, name = path.split(".")
    try:
        for parent in parents:
            source, target = getattr(source, parent), getattr(target, parent)
        field = target.DESCRIPTOR.fields_by_name[name]
    except (AttributeError, KeyError):
        raise InvalidJobConfig(f"there is no setting {path[:60]!r} to change", param=path[:60]) from None
    target.ClearField(name)
    value = getattr(source, name)
    if field.is_repeated:
        getattr(target, name).extend(value)
    elif field.message_type is not None:
        if source.HasField(name):
            getattr(target, name).CopyFrom(value)
    else:
        setattr(target, name, value)
