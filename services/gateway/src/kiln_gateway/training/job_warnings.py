"""What is odd about an accepted job: it runs as asked, and may not be what was meant."""

from __future__ import annotations

import re
from typing import Any

from kiln_common.adapter_names import BASE_NAME
from kiln_common.pb import trainer_pb2


def warnings_of(job: trainer_pb2.Job) -> list[dict[str, Any]]:
    """Objects with code, message and hint; none for most jobs.

    Rewards and teachers teach a job about what it would answer itself: what its starting version drew, or an older
    version of that name. Completions of another adapter, or of the base model where it starts from an
    adapter, are mostly a name mistaken: that a new name starts from the base model is easily forgotten
    while another adapter answers. A student may also be shown what its teacher wrote.
    """
    own_names, start = _start_of(job)
    own_names |= _names_in(job.opd_settings.teacher)
    foreign = {label: count for label, count in job.sampled_by.items() if not _names_in(label) <= own_names}
    if not foreign:
        return []
    num_foreign, num_given = sum(foreign.values()), sum(job.sources.values())
    (most, _), *others = sorted(foreign.items(), key=lambda item: -item[1])
    who = ", ".join([most, *(label for label, _ in others[:2])]) + (" …" if len(others) > 2 else "")
    return [
        {
            "code": "sampled_by_another_adapter",
            "message": f"{num_foreign} of {num_given} completions were drawn by {who}, and {start}",
            "hint": _hint(most, job.config.adapter),
        }
    ]


def _start_of(job: trainer_pb2.Job) -> tuple[set[str], str]:
    """The names whose answers are the job's own, and what it starts from, in words.

    While the job waits nobody has looked yet whether its adapter exists.
    """
    config = job.config
    reference = job.resolved_base_adapter or ("" if job.started_at_s else config.base_adapter)
    if reference:
        return _names_in(reference), f"{config.adapter} goes on from {reference}"
    if job.started_at_s or config.start_fresh:
        return {BASE_NAME}, f"{config.adapter} starts from the base model"
    return {
        BASE_NAME,
        config.adapter,
    }, f"{config.adapter} goes on from itself, or from the base model if it is new"


def _names_in(label: str) -> set[str]:
    """The adapters of a label: several where they were composed ("+"), or changed in between (",")."""
    return {part.partition("@")[0] for part in re.split("[+,]", label)}


def _hint(label: str, adapter: str) -> str:
    if label == BASE_NAME:
        return f'Sample from "{adapter}", or send "base_adapter": null to start from the base model.'
    if len(_names_in(label)) > 1:  # a job starts from one adapter
        return f'Sample from "{adapter}".'
    sampler = label.rpartition(",")[2]  # of versions that followed each other the last
    return f'Send "base_adapter": "{sampler}" to go on from what drew them, or sample from "{adapter}".'
