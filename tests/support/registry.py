"""Builders for the registry: a base model, adapters for it, and a running registry."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from kiln_common.clients.registry import RegistryClient
from kiln_common.pb import common_pb2, registry_pb2
from kiln_registry.bootstrap import start_registry
from kiln_registry.settings import RegistrySettings

MODEL_HASH = "ab" * 32
MODULES = {
    "model.layers.0.linear_attn.in_proj_qkv": (8, 24),
    "model.layers.0.mlp.gate_proj": (8, 12),
    "model.layers.0.mlp.down_proj": (12, 8),
}


def base_model(model_id: str = "demo", model_hash: str = MODEL_HASH) -> common_pb2.BaseModel:
    """A base model of three adaptable layers."""
    return common_pb2.BaseModel(
        model_id=model_id,
        model_hash=model_hash,
        vocab_size=300,
        max_model_len=512,
        eos_token_ids=[299],
        adaptable_modules=[
            common_pb2.AdaptableModule(path=path, in_features=inputs, out_features=outputs)
            for path, (inputs, outputs) in MODULES.items()
        ],
    )


def peft_config(rank: int = 2, **overrides: Any) -> str:
    """adapter_config.json of an adapter on all three layers."""
    return json.dumps(
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["in_proj_qkv", "gate_proj", "down_proj"],
            "bias": "none",
            "use_dora": False,
            **overrides,
        }
    )


def lora_tensors(rank: int = 2, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """PEFT-named A [rank, in] and B [out, rank] of all three layers."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for path, (inputs, outputs) in MODULES.items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = draw.normal(size=(rank, inputs)).astype(dtype)
        tensors[f"{prefix}.lora_B.weight"] = draw.normal(size=(outputs, rank)).astype(dtype)
    return tensors


def adapter_bytes(rank: int = 2, seed: int = 0, dtype: Any = np.float32) -> bytes:
    """adapter_model.safetensors of an adapter on all three layers."""
    return save(lora_tensors(rank, seed, dtype))


def publish_header(name: str, **overrides: Any) -> registry_pb2.PublishHeader:
    """A header that goes with `adapter_bytes()`."""
    fields = {"base_model_hash": MODEL_HASH, "config_json": peft_config(), **overrides}
    return registry_pb2.PublishHeader(name=name, **fields)


def stored_files(state_dir: Path) -> list[Path]:
    """Every blob and every upload on disk."""
    return [p for folder in ("blobs", "uploads") for p in (state_dir / folder).rglob("*") if p.is_file()]


@contextlib.asynccontextmanager
async def running_registry(state_dir: Path, **settings: Any) -> AsyncIterator[RegistryClient]:
    """A registry with `base_model()` registered, and a client of it; `client.address` is its address."""
    fields = {"listen": "127.0.0.1:0", "state_dir": state_dir, "stop_grace_s": 0.2, **settings}
    registry = await start_registry(RegistrySettings(**fields))
    client = RegistryClient(f"127.0.0.1:{registry.port}", timeout_s=60.0)
    client.address = f"127.0.0.1:{registry.port}"  # type: ignore[attr-defined]
    try:
        await client.register_base_model(base_model())
        yield client
    finally:
        await client.close()
        await registry.stop()
