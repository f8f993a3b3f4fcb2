"""What must be refused, against the real services: each with its own code and a hint, and nothing left behind."""

import io
import json
import pickle
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from kiln_cli.up.options import make_run_dir
from kiln_common.bus.connect import connect
from tests.support.registry import adapter_bytes, peft_config
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.processes

CHAT, TEXT, GRPO, SFT = "/v1/chat/completions", "/v1/completions", "/v1/train/grpo", "/v1/train/sft"
UPLOAD = "/v1/adapters/upload"
USER = {"role": "user", "content": "Hi"}
SHORT = {"adapter": "a", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}
MIB = 1024 * 1024


def _archive(members: dict[str, bytes]) -> dict[str, Any]:
    """Multipart fields of an upload of this tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return {"data": {"name": "a"}, "files": {"file": ("adapter.tar.gz", buffer.getvalue())}}


def _folder(weights: bytes, weights_name: str = "adapter_model.safetensors") -> dict[str, Any]:
    return _archive({"a/adapter_config.json": peft_config().encode(), f"a/{weights_name}": weights})


# What is sent (httpx arguments), and the status and code that answer it.
CASES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "malformed JSON": (CHAT, {"content": b'{"messages": ['}, 400, "invalid_json"),
    "an unknown field": (CHAT, {"json": {"messages": [USER], "temprature": 1}}, 400, "unknown_field"),
    "empty messages": (CHAT, {"json": {"messages": []}}, 400, "empty_messages"),
    "a prompt beyond the context": (
        CHAT,
        {"json": {"messages": [{"role": "user", "content": "one two three " * 8000}]}},
        400,
        "prompt_too_long",
    ),
    "token ids beyond the vocabulary": (TEXT, {"json": {"prompt": [10**6]}}, 400, "invalid_token_ids"),
    "negative token ids": (TEXT, {"json": {"prompt": [1, -1]}}, 400, "invalid_token_ids"),
    "an unknown adapter": (
        CHAT,
        {"json": {"messages": [USER], "adapter": "nobody"}},
        404,
        "adapter_not_found",
    ),
    "an unknown version": (CHAT, {"json": {"messages": [USER], "adapter": "nobody@3"}}, 404, "adapter_not_found"),
    "an unknown model": (CHAT, {"json": {"messages": [USER], "model": "nobody"}}, 404, "model_not_found"),
    "attaching an unknown adapter": ("/v1/adapters/nobody/attach", {}, 404, "adapter_not_found"),
    "training an unknown adapter on": (
        GRPO,
        {"json": {**SHORT, "base_adapter": "nobody"}},
        404,
        "adapter_not_found",
    ),
    "a NaN reward": (
        GRPO,
        {"content": json.dumps(SHORT).replace("[1, 0]", "[1, NaN]").encode()},
        400,
        "invalid_reward",
    ),
    "no rewards": (
        GRPO,
        {"json": {key: value for key, value in SHORT.items() if key != "rewards"}},
        400,
        "missing_rewards",
    ),
    "a missing reward": (GRPO, {"json": {**SHORT, "rewards": [1, None]}}, 400, "missing_rewards"),
    "a group of one": (GRPO, {"json": {**SHORT, "completions": ["x"], "rewards": [1]}}, 400, "group_too_small"),
    "equal rewards": (GRPO, {"json": {**SHORT, "rewards": [1, 1]}}, 400, "no_learning_signal"),
    "lists of different lengths": (GRPO, {"json": {**SHORT, "rewards": [1, 0, 1]}}, 400, "length_mismatch"),
    "an unknown completion": (
        GRPO,
        {
            "json": {
                "adapter": "a",
                "groups": [{"rollouts": [{"completion_id": "chatcmpl_x", "reward": r} for r in (0, 1)]}],
            }
        },
        404,
        "rollout_not_found",
    ),
    "a document beyond the context": (
        SFT,
        {"json": {"adapter": "a", "examples": [{"prompt": "Hi", "completion": "one two three " * 8000}]}},
        400,
        "document_too_long",
    ),
    "no assistant to learn from": (
        SFT,
        {"json": {"adapter": "a", "examples": [{"messages": [USER]}]}},
        400,
        "no_assistant_message",
    ),
    "an oversized body": (CHAT, {"content": b'{"messages": "' + b"x" * (33 * MIB) + b'"}'}, 413, "body_too_large"),
    "a tar with ..": (UPLOAD, _archive({"../../adapter_config.json": b"{}"}), 400, "unsafe_archive"),
    "an archive that is none": (
        UPLOAD,
        {"data": {"name": "a"}, "files": {"file": ("adapter.tar.gz", b"no archive at all")}},
        400,
        "invalid_archive",
    ),
    "a pickle": (UPLOAD, _folder(pickle.dumps({}), "adapter_model.bin"), 400, "pickle_refused"),
    "a pickle under another name": (UPLOAD, _folder(pickle.dumps({})), 400, "pickle_refused"),
    "an adapter for another model": (UPLOAD, _folder(adapter_bytes()), 400, "adapter_mismatch"),
    "tensors that are none": (UPLOAD, _folder(b"not safetensors at all, but long enough"), 400, "invalid_safetensors"),
}  # fmt: skip


def _left_behind(stack: Stack) -> dict[str, Any]:
    """What a request could leave in a stack: in the engine, the catalogue and its files, jobs, rollouts."""
    engine = stack.get("/v1/stats")["engine"]
    redis = connect(f"unix://{make_run_dir(stack.state_dir.resolve())}/redis.sock")
    try:
        num_rollouts = sum(1 for _ in redis.scan_iter("kiln:rollout*"))
    finally:
        redis.close()
    return {
        "sequences": engine["running"] + engine["waiting"],
        "pages held by sequences": engine["pages_in_use"] - engine["pages_cached"],
        "state slots held by sequences": engine["state_slots_in_use"] - engine["state_slots_cached"],
        "adapters": stack.get("/v1/adapters")["data"],
        "jobs": [job["id"] for job in stack.get("/v1/train/jobs")["data"]],
        "rollouts": num_rollouts,
        "blobs": sorted(str(p) for p in (stack.state_dir / "registry").rglob("*") if "sqlite" not in p.name),
    }


def _uploads() -> set[Path]:
    """Temporary folders of uploads, those of other stacks on this machine among them."""
    return set(Path(tempfile.gettempdir()).glob("kiln-upload-*"))


def test_bad_input_is_refused_by_code_and_leaves_nothing_behind(stack):
    before, uploads_before = _left_behind(stack), _uploads()
    assert before["sequences"] == before["pages held by sequences"] == 0
    for name, (path, sent, status, code) in CASES.items():
        response = httpx.post(f"{stack.url}{path}", timeout=60, **sent)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code), (name, error)
        assert error["hint"], (name, error)
        assert error["type"] == "invalid_request_error", (name, error)
    wait_for(
        lambda: _left_behind(stack) == before and _uploads() <= uploads_before, "everything to be as before"
    )
    # And it still works.
    assert stack.chat("What is 2 + 2?", max_tokens=4).status_code == 200
