"""Every request the clients make, by what it is about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from kiln.call import Call, as_data, as_json
from kiln.values import Adapter, AdapterVersion, JobState, JsonObject, Messages, Prompt, Reward, Rollout

ONE_PROMPT_TYPES = (str, Mapping)


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="@") for part in parts)


def _post(path: str, body: Any, parse: Any = as_json, idempotency_key: str | None = None) -> Call[Any]:
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
    return Call("POST", path, parse, {"json": body, "headers": headers})


def conversations(prompts: Prompt | Sequence[Prompt]) -> list[Messages]:
    """One prompt or several, each a user message's text or a list of messages, as conversations."""
    if isinstance(prompts, str):
        return [[{"role": "user", "content": prompts}]]
    if prompts and all(isinstance(item, Mapping) for item in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    return [conversations(prompt)[0] for prompt in prompts]  # type: ignore[arg-type]


def rollouts(prompts: Prompt | Sequence[Prompt], n: int, sampling: JsonObject) -> Call[list[Rollout]]:
    messages = conversations(prompts)
    body = {"temperature": 1.0, "logprobs": False, "return_token_ids": False, **sampling, "n": n}

    def parse(response: httpx.Response) -> list[Rollout]:
        return [
            Rollout(
                messages=messages[answer["prompt_index"]],
                text=choice["message"].get("content") or "",
                reasoning=choice["message"].get("reasoning_content"),
                completion_id=answer["id"],
                index=choice["index"],
                adapter=answer["kiln"]["adapter"],
                finish_reason=choice["finish_reason"],
            )
            for answer in response.json()["data"]
            for choice in answer["choices"]
        ]

    return _post("/v1/completions/batch", {**body, "prompts": messages}, parse)


def grpo_groups(rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> list[JsonObject]:
    """Scored rollouts as the groups of a GRPO job: those of one conversation belong together."""
    if len(rollouts) != len(rewards):
        raise ValueError(f"there are {len(rollouts)} rollouts and {len(rewards)} rewards")
    groups: dict[str, list[JsonObject]] = {}
    for rollout, reward in zip(rollouts, rewards, strict=True):
        entry = {"completion_id": rollout.completion_id, "index": rollout.index, "reward": reward}
        groups.setdefault(json.dumps(rollout.messages, sort_keys=True), []).append(entry)
    return [{"rollouts": entries} for entries in groups.values()]


def submit_job(recipe: str, body: JsonObject, idempotency_key: str | None) -> Call[JobState]:
    return _post(_path("train", recipe), body, _job, idempotency_key)


def _job(response: httpx.Response) -> JobState:
    return JobState.of(response.json())


def get_job(job_id: str) -> Call[JobState]:
    return Call("GET", _path("train", "jobs", job_id), _job)


def list_jobs(limit: int) -> Call[list[JobState]]:
    def parse(response: httpx.Response) -> list[JobState]:
        return [JobState.of(job) for job in as_data(response)]

    return Call("GET", "/v1/train/jobs", parse, {"params": {"limit": limit}})


def cancel_job(job_id: str, discard: bool) -> Call[JobState]:
    options = {"json": {"published": "discard"}} if discard else {}
    return Call("POST", _path("train", "jobs", job_id, "cancel"), _job, options)


def retry_job(job_id: str, changes: JsonObject, idempotency_key: str | None) -> Call[JobState]:
    path = _path("train", "jobs", job_id, "retry")
    return _post(path, changes, _job, idempotency_key)


def job_receipt(job_id: str) -> Call[JsonObject]:
    return Call("GET", _path("train", "jobs", job_id, "receipt"), as_json)


def job_events_path(job_id: str) -> str:
    return _path("train", "jobs", job_id, "events")


def get(path: str, **params: Any) -> Call[JsonObject]:
    return Call("GET", path, as_json, {"params": params} if params else {})


def health() -> Call[JsonObject]:
    return Call("GET", "/health", as_json, answers_with=(503,))


def list_models() -> Call[list[JsonObject]]:
    return Call("GET", "/v1/models", as_data)


def list_adapters() -> Call[list[Adapter]]:
    return Call("GET", "/v1/adapters", lambda response: [Adapter.of(entry) for entry in as_data(response)])


def get_adapter(name: str) -> Call[Adapter]:
    return Call("GET", _path("adapters", name), lambda response: Adapter.of(response.json()))


def attach_adapter(name: str, version: int | None) -> Call[JsonObject]:
    return _post(_path("adapters", name, "attach"), {} if version is None else {"version": version})


def detach_adapter() -> Call[JsonObject]:
    return _post("/v1/adapters/detach", {})


def roll_back_adapter(name: str, version: int) -> Call[JsonObject]:
    return _post(_path("adapters", name, "rollback"), {"version": version})


def diff_adapter(name: str, from_version: int | None, to_version: int | None) -> Call[JsonObject]:
    params = {"from": from_version, "to": to_version}
    return get(_path("adapters", name, "diff"), **{k: v for k, v in params.items() if v is not None})


def merge_adapters(
    sources: Mapping[str, float], output: str, mode: str, idempotency_key: str | None
) -> Call[JsonObject]:
    entries = [{"name": name, "weight": weight} for name, weight in sources.items()]
    body = {"sources": entries, "mode": mode, "output": output}
    return _post("/v1/adapters/merge", body, idempotency_key=idempotency_key)


def delete_adapter(reference: str) -> Call[JsonObject]:
    return Call("DELETE", _path("adapters", reference), as_json)


def download_path(name: str) -> str:
    return _path("adapters", name, "download")


def upload_adapter(
    name: str, files: Sequence[tuple[str, bytes]], attach: bool, idempotency_key: str | None
) -> Call[AdapterVersion]:
    options = {
        "data": {"name": name, "attach": str(attach).lower()},
        "files": [("file", entry) for entry in files],
        "headers": {"Idempotency-Key": idempotency_key} if idempotency_key else {},
    }
    return Call("POST", "/v1/adapters/upload", lambda response: AdapterVersion.of(response.json()), options)


def upload_dataset(data: bytes, name: str, format: str) -> Call[JsonObject]:
    params = {key: value for key, value in (("name", name), ("format", format)) if value}
    headers = {"Content-Type": "application/x-ndjson"}
    return Call("POST", "/v1/datasets", as_json, {"content": data, "params": params, "headers": headers})


def list_datasets() -> Call[list[JsonObject]]:
    return Call("GET", "/v1/datasets", as_data)


def get_dataset(dataset_id: str) -> Call[JsonObject]:
    return Call("GET", _path("datasets", dataset_id), as_json)


def sample_dataset(dataset_id: str, n: int, seed: int) -> Call[list[JsonObject]]:
    return Call("GET", _path("datasets", dataset_id, "sample"), as_data, {"params": {"n": n, "seed": seed}})


def delete_dataset(dataset_id: str) -> Call[JsonObject]:
    return Call("DELETE", _path("datasets", dataset_id), as_json)


def add_correction(completion_id: str, correction: str, index: int) -> Call[JsonObject]:
    body = {"completion_id": completion_id, "index": index, "correction": correction}
    return _post("/v1/corrections", body)


def list_corrections() -> Call[list[JsonObject]]:
    return Call("GET", "/v1/corrections", as_data)


def delete_correction(correction_id: str) -> Call[JsonObject]:
    return Call("DELETE", _path("corrections", correction_id), as_json)


def put_suite(name: str, cases: str | Sequence[JsonObject]) -> Call[JsonObject]:
    content = {"jsonl": cases} if isinstance(cases, str) else {"cases": list(cases)}
    return _post("/v1/evals/suites", {"name": name, **content})


def list_suites() -> Call[list[JsonObject]]:
    return Call("GET", "/v1/evals/suites", as_data)


def start_eval(
    suite: str, model: str | None, sampling: JsonObject, idempotency_key: str | None
) -> Call[JsonObject]:
    body: JsonObject = {"suite": suite, **({"sampling": sampling} if sampling else {})}
    if model is not None:
        body["adapter"] = None if model == "base" else model
    return _post("/v1/evals/runs", body, idempotency_key=idempotency_key)


def get_eval(run_id: str, cases: bool) -> Call[JsonObject]:
    options = {"params": {"cases": "true"}} if cases else {}
    return Call("GET", _path("evals", "runs", run_id), as_json, options)


def list_evals(model: str | None, status: str | None, limit: int) -> Call[list[JsonObject]]:
    chosen = {"adapter": model, "status": status, "limit": limit}
    params = {name: value for name, value in chosen.items() if value is not None}
    return Call("GET", "/v1/evals/runs", as_data, {"params": params})


def delete_eval(run_id: str) -> Call[JsonObject]:
    return Call("DELETE", _path("evals", "runs", run_id), as_json)


def compare_evals(baseline: str, candidate: str) -> Call[JsonObject]:
    return _post("/v1/evals/compare", {"baseline": baseline, "candidate": candidate})


def adapter_files(source: str | Path) -> list[tuple[str, bytes]]:
    """A PEFT folder or an archive of one, as (file name, bytes).

    Raises:
        FileNotFoundError: `source` is not there, or the folder lacks one of the two files.
    """
    path = Path(source)
    if not path.is_dir():
        return [(path.name, path.read_bytes())]
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [(name, (path / name).read_bytes()) for name in names]
