"""POST /v1/train/sft, /v1/train/grpo and /v1/train/opd, and the overview."""

from __future__ import annotations

import contextlib

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_common.adapter_names import check_adapter_name
from kiln_common.errors import AdapterNotFound, RegistryUnavailable
from kiln_common.pb import trainer_pb2
from kiln_gateway.auth import Caller, require
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.routes.health import training_summary
from kiln_gateway.schemas.opd import OpdBody
from kiln_gateway.schemas.training import GroupFields, GrpoBody, JobFields, SftBody, SftExampleFields
from kiln_gateway.training.documents import DocumentBuilder
from kiln_gateway.training.gate import resolved_gate
from kiln_gateway.training.grpo import GrpoSpecBuilder
from kiln_gateway.training.job_config import GRPO_DEFAULTS, OPD_DEFAULTS, SFT_DEFAULTS, job_config
from kiln_gateway.training.job_rights import attaches, check_priority, is_visible, visible_running_job
from kiln_gateway.training.job_view import job_object
from kiln_gateway.training.kept_data import chosen_corrections, dataset_rows
from kiln_gateway.training.kept_rollouts import KeptRollouts
from kiln_gateway.training.opd import OpdSpecBuilder
from kiln_gateway.training.sft import correction_documents, dataset_spec, sft_spec, to_spec

router = APIRouter()
_TRAIN = Depends(require("train"))
_ACCEPTED = 202


@router.post("/v1/train/sft", status_code=_ACCEPTED)
async def train_sft(request: Request, caller: Caller = _TRAIN) -> Response:
    """Learn from examples: conversations, or pairs of prompt and completion."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, SftBody)
    key, job_id = await gateway.idempotency.find(request, caller.owner)
    if job_id:
        return await _accepted(gateway, job_id)
    rollouts = await _check_and_open(gateway, body, caller)
    builder = DocumentBuilder(gateway.prompts)
    submit = trainer_pb2.SubmitRequest()
    if body.dataset is None:
        spec = await sft_spec(body, builder, rollouts)
    else:
        rows = await dataset_rows(gateway, caller, body.dataset, SftExampleFields, submit)
        spec = await dataset_spec(body.dataset, rows, body, builder)
    if body.corrections is not None:
        chosen = await chosen_corrections(gateway, caller, body.corrections)
        spec.MergeFrom(to_spec(correction_documents(chosen)))
        submit.correction_ids.extend(each.id for each in chosen)
    longest = max((len(example.token_ids) for example in spec.examples), default=0)
    gate = await resolved_gate(body.gate, caller.owner, gateway.clients.evaluations)
    submit.config.CopyFrom(
        job_config(body, SFT_DEFAULTS, longest_document=longest, attach=attaches(body, caller), gate=gate)
    )
    submit.sft.CopyFrom(spec)
    return await _submit(gateway, request, caller, body, submit, key)


@router.post("/v1/train/grpo", status_code=_ACCEPTED)
async def train_grpo(request: Request, caller: Caller = _TRAIN) -> Response:
    """Learn from rewards: groups of scored completions of one prompt each."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, GrpoBody)
    key, job_id = await gateway.idempotency.find(request, caller.owner)
    if job_id:
        return await _accepted(gateway, job_id)
    rollouts = await _check_and_open(gateway, body, caller)
    vocab_size = (await gateway.engines.base_model()).vocab_size
    builder = GrpoSpecBuilder(body, DocumentBuilder(gateway.prompts), rollouts, vocab_size)
    submit = trainer_pb2.SubmitRequest()
    groups = None
    if body.dataset is not None:
        rows = await dataset_rows(gateway, caller, body.dataset, GroupFields, submit)
        groups = [group for _, group in rows]
    spec = await builder.build(groups)
    longest = max(
        len(rollout.prompt_token_ids) + len(rollout.completion_token_ids)
        for group in spec.groups
        for rollout in group.rollouts
    )
    gate = await resolved_gate(body.gate, caller.owner, gateway.clients.evaluations)
    submit.config.CopyFrom(
        job_config(body, GRPO_DEFAULTS, longest_document=longest, attach=attaches(body, caller), gate=gate)
    )
    submit.grpo.CopyFrom(spec)
    return await _submit(gateway, request, caller, body, submit, key)


@router.post("/v1/train/opd", status_code=_ACCEPTED)
async def train_opd(request: Request, caller: Caller = _TRAIN) -> Response:
    """Learn from a teacher's judgement of one's own completions (on-policy distillation)."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, OpdBody)
    key, job_id = await gateway.idempotency.find(request, caller.owner)
    if job_id:
        return await _accepted(gateway, job_id)
    rollouts = await _check_and_open(gateway, body, caller)
    base_model = await gateway.engines.base_model()
    spec = await OpdSpecBuilder(body, gateway, rollouts, base_model, caller).build()
    lengths = [len(prompt.token_ids) + spec.settings.sampling.max_tokens for prompt in spec.prompts]
    lengths += [len(given.prompt_token_ids) + len(given.completion_token_ids) for given in spec.rollouts]
    gate = await resolved_gate(body.gate, caller.owner, gateway.clients.evaluations)
    config = job_config(
        body, OPD_DEFAULTS, longest_document=max(lengths), attach=attaches(body, caller), gate=gate
    )
    return await _submit(
        gateway, request, caller, body, trainer_pb2.SubmitRequest(config=config, opd=spec), key
    )


async def _check_and_open(gateway: Gateway, body: JobFields, caller: Caller) -> KeptRollouts:
    """What all recipes check before any text is touched; then the caller's rollouts."""
    check_priority(body.priority, caller)
    check_adapter_name(body.adapter, reserved=await gateway.base_ids())
    with contextlib.suppress(RegistryUnavailable):  # it refuses the result, too
        await gateway.clients.registry.check_publish(body.adapter, caller.owner)
    base_model = await gateway.engines.base_model()
    if body.base_adapter is not None:
        await gateway.resolver.version(body.base_adapter, base_model.model_hash, "base_adapter", caller)
    elif not body.starts_fresh:
        with contextlib.suppress(AdapterNotFound):  # the first version of its name
            await gateway.resolver.version(body.adapter, base_model.model_hash, "adapter", caller)
    return KeptRollouts(gateway.rollouts, caller.owner, base_model.model_hash)


async def _submit(
    gateway: Gateway,
    request: Request,
    caller: Caller,
    body: JobFields,
    submit: trainer_pb2.SubmitRequest,
    key: str,
) -> Response:
    if body.webhook is not None:
        submit.webhook.CopyFrom(body.webhook.to_proto())
    submit.idempotency_key = key
    submit.owner = caller.owner
    submit.base_model_hash = (await gateway.engines.base_model()).model_hash
    job = await gateway.clients.trainer.submit(submit)
    await gateway.idempotency.remember(request, key, job.id)
    return json_response(job_object(job), status=_ACCEPTED)


async def _accepted(gateway: Gateway, job_id: str) -> Response:
    return json_response(job_object(await gateway.clients.trainer.get(job_id)), status=_ACCEPTED)


@router.get("/v1/train/status")
async def training_status(request: Request, caller: Caller = _TRAIN) -> Response:
    """The trainers: what they run, how much waits, whose weights they map."""
    trainer = gateway_of(request).clients.trainer
    found = [status for status in await trainer.statuses() if status is not None]
    found = found or [await trainer.status()]  # which says why there is none
    body = training_summary(found)
    running_job_id = body["running_job_id"] or ""
    model_hash = next((status.model_hash for status in found if status.model_hash), None)
    body |= {
        "status": "running" if running_job_id else "idle",
        "running_job_id": await visible_running_job(trainer, running_job_id, caller),
        "model_hash": model_hash,
    }
    return json_response(body)


@router.get("/v1/train/queue")
async def training_queue(request: Request, caller: Caller = _TRAIN) -> Response:
    """Jobs that run, and those that wait in the order in which they will run."""
    jobs = await gateway_of(request).clients.trainer.queue()
    return json_response(
        {"object": "list", "data": [job_object(job) for job in jobs if is_visible(job, caller)]}
    )
