"""What a job learns from besides its own body: a dataset, corrections."""

from __future__ import annotations

from typing import Literal, TypeVar

from kiln_common.pb import trainer_pb2
from kiln_gateway.auth import Caller
from kiln_gateway.corrections import Correction, CorrectionNotFound, NoUnusedCorrections
from kiln_gateway.datasets.reading import DatasetReader, WrongDatasetFormat
from kiln_gateway.gateway import Gateway
from kiln_gateway.schemas.training import GroupFields, SftExampleFields

R = TypeVar("R", SftExampleFields, GroupFields)


async def chosen_corrections(
    gateway: Gateway, caller: Caller, wanted: Literal["unused"] | list[str]
) -> list[Correction]:
    """The caller's own for the model that is served, oldest first where none is named.

    That another job has one is for the trainer to find out, in the transaction that accepts this one.

    Raises:
        NoUnusedCorrections, CorrectionNotFound.
    """
    model_hash = (await gateway.engines.base_model()).model_hash
    if wanted != "unused":
        named = [await gateway.corrections.get(each, caller.owner) for each in dict.fromkeys(wanted)]
        for each in named:
            if each.model_hash != model_hash:
                raise CorrectionNotFound(f"{each.id} is for another base model", param="corrections")
        return named
    unused = await gateway.corrections.unused(caller.owner, model_hash)
    if not unused:
        raise NoUnusedCorrections("no correction is unused and of this model", param="corrections")
    return unused


async def dataset_rows(
    gateway: Gateway, caller: Caller, dataset_id: str, wanted: type[R], submit: trainer_pb2.SubmitRequest
) -> list[tuple[int, R]]:
    """A dataset's rows with their lines' numbers; `submit` gets to name it.

    Raises:
        DatasetNotFound, WrongDatasetFormat, DatasetTooLargeForJob.
    """
    reader = DatasetReader(gateway.clients.datasets, caller)
    dataset = await reader.find(dataset_id)
    if (dataset.format == "rollouts") != (wanted is GroupFields):
        raise WrongDatasetFormat(f"{dataset_id} is a dataset of {dataset.format}", param="dataset")
    rows = await reader.rows(dataset, gateway.settings.max_job_dataset_bytes)
    submit.dataset.CopyFrom(trainer_pb2.DatasetRef(id=dataset.id, sha256=dataset.sha256))
    return [(line, row) for line, row in rows if isinstance(row, wanted)]
