"""Engine process settings."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from kiln_common.base_model_id import ServedModelName
from kiln_common.rpc.client_listener import ClientListener
from kiln_common.settings import LogLevel


def _default_socket_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"kiln-{os.getuid()}"


class EngineSettings(ClientListener, BaseSettings):
    """Engine process settings, read once from KILN_ENGINE_*. Zero leaves a number to the engine."""

    model_config = SettingsConfigDict(env_prefix="KILN_ENGINE_", frozen=True, protected_namespaces=())

    model_path: str = Field(description="checkpoint folder, or a hub id such as Qwen/Qwen3.5-4B")
    served_model_name: ServedModelName = Field(
        "", description="the base model's id; empty takes the checkpoint's own"
    )
    listen: str = Field("127.0.0.1:8430", description="gRPC address: host:port or unix:/path")
    advertise_address: str = Field(
        "",
        description="address that gateways and trainers find on Redis; empty: the one it listens on, by"
        " this machine's name where that is every interface",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "fp8", "int4"] = Field(
        "none",
        description="round the decoder's large matrices at load; fp8: 8 bits, a scale for each output; int4: 4"
        " bits, groups of 128; none: as stored, which may be quantised (see quantization.md)",
    )
    kv_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="format of cached keys and values; auto: the model's; fp8 (e4m3) needs a GPU of compute capability 8.9 or newer",
    )
    state_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="format of committed recurrent states; auto: float32"
    )
    head_quantization: Literal["none", "fp8", "int4"] = Field(
        "none",
        description="format of a second copy of the head, read by steps of up to 128 rows: faster with few"
        " sequences, and their probabilities differ from the trainer's by its rounding",
    )
    cuda_graphs: bool = Field(
        True, description="capture steps as CUDA graphs at start, without which they are launched (GPU)"
    )
    compile_threads: NonNegativeInt = Field(
        0,
        description="threads that compile kernels at the first start on a kind of GPU; 0: as many as the cores"
        " it may use, up to 16; 1: kernels are compiled one after another as they are met (GPU)",
    )
    batch_invariant: bool = Field(
        False,
        description="give a seeded request the same tokens, to the bit, alone and in any batch; slower:"
        " see operations.md (on a GPU: bfloat16 only)",
    )
    speculation: Literal["none", "ngram", "mtp"] = Field(
        "none",
        description="where guesses of the next tokens come from, several of which one step can confirm;"
        " ngram: what followed the same words earlier in the text; mtp: the checkpoint's"
        " multi-token-prediction layer, adapted by adapters that were trained to (each adapter slot has room"
        " for that); answers are the same with and without, up to rounding; while drafts are verified on a GPU"
        " one core waits spinning; not with batch_invariant",
    )
    mtp_hidden: Literal["normed", "residual"] = Field(
        "normed",
        description="what the multi-token-prediction layer reads of the model: its last hidden state after"
        " the final norm, as the released models are trained, or before it",
    )
    draft_vocab_tokens: NonNegativeInt = Field(
        32768,
        description="mtp guesses among this many tokens, the lowest ids, which are the commonest; 0: among all",
    )
    max_draft_tokens: int = Field(3, ge=1, le=7, description="most tokens guessed ahead of a sequence")
    adaptive_drafts: bool = Field(
        True,
        description="guess only as far as it pays by measured times and acceptance; off: always as far as allowed",
    )
    num_threads: PositiveInt = Field(1, description="CPU threads of a step")

    page_tokens: PositiveInt = Field(16, description="tokens in one KV page")
    max_model_len: NonNegativeInt = Field(
        0, description="most tokens of prompt and completion; 0: the model's, or fewer if memory holds fewer"
    )
    kv_cache_tokens: NonNegativeInt = Field(
        0, description="tokens of KV cache; 0: 65,536 on a CPU, what memory leaves on a GPU"
    )
    gpu_memory_fraction: float = Field(
        0.6,
        gt=0,
        le=1,
        description="share of a GPU's memory for this engine, weights included; the rest is the trainer's",
    )
    max_running: NonNegativeInt = Field(
        0,
        description="most sequences in a step; 0: 32 on a CPU, 256 on a GPU, or fewer if memory holds fewer",
    )
    num_state_slots: NonNegativeInt = Field(
        0, description="recurrent states kept; 0: twice max_running, in half of what memory leaves at most"
    )
    checkpoint_interval_tokens: PositiveInt = Field(
        1024, description="distance between the state checkpoints of a prompt made while there is room"
    )
    step_token_budget: NonNegativeInt = Field(
        0, description="most tokens in one forward pass; 0: 512 on a CPU, 8,192 on a GPU"
    )
    run_ahead: int | None = Field(
        None,
        ge=0,
        le=1,
        description="steps launched before the results of the one that runs are read;"
        " unset: 1 on a GPU, 0 on a CPU, where a step runs as it is launched",
    )
    num_adapter_slots: PositiveInt = Field(8, description="adapter versions on the device at once")
    max_adapter_rank: PositiveInt = Field(64, description="highest LoRA rank that fits a slot")
    adapter_slot_wait_s: float = Field(
        30.0, ge=0, description="how long a request waits for an adapter slot while all are in use"
    )
    grammar_time_limit_s: PositiveFloat = Field(
        1.0, description="longest that compiling a request's grammar may take"
    )
    adapter_refresh_s: PositiveFloat = Field(
        5.0, description="about how often adapters are compared with the registry's default and latest"
    )

    registry_address: str = Field(
        "", description="where adapters come from; empty serves the base model only"
    )
    redis_url: str = Field(
        "", description="where the engine announces itself and hears of new versions; empty: neither"
    )
    socket_dir: Path = Field(
        default_factory=_default_socket_dir, description="private folder of the weight-sharing socket"
    )
    weight_transport: Literal["auto", "vmm", "legacy"] = Field(
        "auto",
        description="how a trainer maps the weights on a GPU; vmm: by a descriptor, read-only by hardware;"
        " legacy: by a CUDA IPC handle, read-only by convention; auto: vmm where it works",
    )
    old_lease_wait_s: float = Field(
        30.0, ge=0, description="how long a restarted engine waits for the old weights to be let go (GPU)"
    )
    drain_timeout_s: float = Field(30.0, ge=0, description="time running requests get when the engine stops")
    outbox_steps: PositiveInt = Field(1024, description="steps a client may lag behind before it is cut off")
    log_level: LogLevel = "INFO"
