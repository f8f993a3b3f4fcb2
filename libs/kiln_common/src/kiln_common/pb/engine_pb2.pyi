from kiln_common.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_POLICY_PIN: _ClassVar[AdapterPolicy]
    ADAPTER_POLICY_LATEST: _ClassVar[AdapterPolicy]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
ADAPTER_POLICY_PIN: AdapterPolicy
ADAPTER_POLICY_LATEST: AdapterPolicy
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop_token_ids", "ignore_eos", "num_top_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    num_top_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., num_top_logprobs: _Optional[int] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("json_schema", "regex", "lark", "ebnf", "trigger_token_id")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    LARK_FIELD_NUMBER: _ClassVar[int]
    EBNF_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    lark: str
    ebnf: str
    trigger_token_id: int
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., lark: _Optional[str] = ..., ebnf: _Optional[str] = ..., trigger_token_id: _Optional[int] = ...) -> None: ...

class Thinking(_message.Message):
    __slots__ = ("end_token_id", "budget_tokens", "before_end_token_ids", "after_end_token_ids")
    END_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    end_token_id: int
    budget_tokens: int
    before_end_token_ids: _containers.RepeatedScalarFieldContainer[int]
    after_end_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, end_token_id: _Optional[int] = ..., budget_tokens: _Optional[int] = ..., before_end_token_ids: _Optional[_Iterable[int]] = ..., after_end_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "adapters", "num_stable_prefix_tokens", "cache_salt", "priority", "timeout_s", "num_shared_prefix_tokens", "grammar", "thinking", "adapter_policy", "num_prompt_logprobs", "wants_embedding", "first_prompt_logprob", "packs_prompt_logprobs", "traceparent", "resumed_token_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_STABLE_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_POLICY_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    WANTS_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    FIRST_PROMPT_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    PACKS_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    adapters: _containers.RepeatedCompositeFieldContainer[_common_pb2.AdapterRef]
    num_stable_prefix_tokens: int
    cache_salt: str
    priority: int
    timeout_s: float
    num_shared_prefix_tokens: int
    grammar: Grammar
    thinking: Thinking
    adapter_policy: AdapterPolicy
    num_prompt_logprobs: int
    wants_embedding: bool
    first_prompt_logprob: int
    packs_prompt_logprobs: bool
    traceparent: str
    resumed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., adapters: _Optional[_Iterable[_Union[_common_pb2.AdapterRef, _Mapping]]] = ..., num_stable_prefix_tokens: _Optional[int] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., timeout_s: _Optional[float] = ..., num_shared_prefix_tokens: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., thinking: _Optional[_Union[Thinking, _Mapping]] = ..., adapter_policy: _Optional[_Union[AdapterPolicy, str]] = ..., num_prompt_logprobs: _Optional[int] = ..., wants_embedding: bool = ..., first_prompt_logprob: _Optional[int] = ..., packs_prompt_logprobs: bool = ..., traceparent: _Optional[str] = ..., resumed_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("submit", "abort")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    submit: GenerateRequest
    abort: str
    def __init__(self, submit: _Optional[_Union[GenerateRequest, _Mapping]] = ..., abort: _Optional[str] = ...) -> None: ...

class TopLogprobs(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("request_id", "token_ids", "logprobs", "sampled_logprobs", "top_logprobs", "finish_reason", "error", "num_cached_tokens", "seed", "queue_s", "moved_to", "prompt_logprobs", "top_prompt_logprobs", "embedding", "packed_top_token_ids", "packed_top_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    MOVED_TO_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    PACKED_TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PACKED_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    sampled_logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    finish_reason: FinishReason
    error: _common_pb2.ErrorDetail
    num_cached_tokens: int
    seed: int
    queue_s: float
    moved_to: _containers.RepeatedCompositeFieldContainer[_common_pb2.AdapterRef]
    prompt_logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    embedding: _containers.RepeatedScalarFieldContainer[float]
    packed_top_token_ids: bytes
    packed_top_logprobs: bytes
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., sampled_logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., error: _Optional[_Union[_common_pb2.ErrorDetail, _Mapping]] = ..., num_cached_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., queue_s: _Optional[float] = ..., moved_to: _Optional[_Iterable[_Union[_common_pb2.AdapterRef, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[float]] = ..., top_prompt_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ..., embedding: _Optional[_Iterable[float]] = ..., packed_top_token_ids: _Optional[bytes] = ..., packed_top_logprobs: _Optional[bytes] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineInfo(_message.Message):
    __slots__ = ("base_model", "boot_id", "device", "dtype", "page_tokens", "num_pages", "num_state_slots", "num_adapter_slots", "max_adapter_rank", "max_running", "adapter_socket_path", "weights_scheme", "speculation", "device_id")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_STATE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SCHEME_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    base_model: _common_pb2.BaseModel
    boot_id: str
    device: str
    dtype: str
    page_tokens: int
    num_pages: int
    num_state_slots: int
    num_adapter_slots: int
    max_adapter_rank: int
    max_running: int
    adapter_socket_path: str
    weights_scheme: str
    speculation: str
    device_id: str
    def __init__(self, base_model: _Optional[_Union[_common_pb2.BaseModel, _Mapping]] = ..., boot_id: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., page_tokens: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_state_slots: _Optional[int] = ..., num_adapter_slots: _Optional[int] = ..., max_adapter_rank: _Optional[int] = ..., max_running: _Optional[int] = ..., adapter_socket_path: _Optional[str] = ..., weights_scheme: _Optional[str] = ..., speculation: _Optional[str] = ..., device_id: _Optional[str] = ...) -> None: ...

class ResidentAdapter(_message.Message):
    __slots__ = ("adapter", "slot", "num_pins")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NUM_PINS_FIELD_NUMBER: _ClassVar[int]
    adapter: _common_pb2.AdapterRef
    slot: int
    num_pins: int
    def __init__(self, adapter: _Optional[_Union[_common_pb2.AdapterRef, _Mapping]] = ..., slot: _Optional[int] = ..., num_pins: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemoryPart(_message.Message):
    __slots__ = ("name", "num_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_bytes: int
    def __init__(self, name: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class DraftTotals(_message.Message):
    __slots__ = ("adapter", "num_proposed", "num_accepted")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    NUM_PROPOSED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    num_proposed: int
    num_accepted: int
    def __init__(self, adapter: _Optional[str] = ..., num_proposed: _Optional[int] = ..., num_accepted: _Optional[int] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_pages_in_use", "num_pages_cached", "num_pages", "num_state_slots_in_use", "num_state_slots_cached", "num_state_slots", "num_steps", "num_prompt_tokens", "num_generated_tokens", "num_cached_tokens", "num_tokens_lost_for_want_of_checkpoint", "num_preemptions", "resident_adapters", "num_weight_leases", "is_draining", "uptime_s", "num_adapter_slots", "step_seconds", "adapter_load_seconds", "memory_parts", "num_device_bytes", "num_device_bytes_free", "drafts")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_IN_USE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_STATE_SLOTS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    NUM_STATE_SLOTS_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_STATE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_LOST_FOR_WANT_OF_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_WEIGHT_LEASES_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_SLOTS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICE_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_pages_in_use: int
    num_pages_cached: int
    num_pages: int
    num_state_slots_in_use: int
    num_state_slots_cached: int
    num_state_slots: int
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_tokens_lost_for_want_of_checkpoint: int
    num_preemptions: int
    resident_adapters: _containers.RepeatedCompositeFieldContainer[ResidentAdapter]
    num_weight_leases: int
    is_draining: bool
    uptime_s: float
    num_adapter_slots: int
    step_seconds: _common_pb2.Histogram
    adapter_load_seconds: _common_pb2.Histogram
    memory_parts: _containers.RepeatedCompositeFieldContainer[MemoryPart]
    num_device_bytes: int
    num_device_bytes_free: int
    drafts: _containers.RepeatedCompositeFieldContainer[DraftTotals]
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_pages_in_use: _Optional[int] = ..., num_pages_cached: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_state_slots_in_use: _Optional[int] = ..., num_state_slots_cached: _Optional[int] = ..., num_state_slots: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_tokens_lost_for_want_of_checkpoint: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., resident_adapters: _Optional[_Iterable[_Union[ResidentAdapter, _Mapping]]] = ..., num_weight_leases: _Optional[int] = ..., is_draining: bool = ..., uptime_s: _Optional[float] = ..., num_adapter_slots: _Optional[int] = ..., step_seconds: _Optional[_Union[_common_pb2.Histogram, _Mapping]] = ..., adapter_load_seconds: _Optional[_Union[_common_pb2.Histogram, _Mapping]] = ..., memory_parts: _Optional[_Iterable[_Union[MemoryPart, _Mapping]]] = ..., num_device_bytes: _Optional[int] = ..., num_device_bytes_free: _Optional[int] = ..., drafts: _Optional[_Iterable[_Union[DraftTotals, _Mapping]]] = ...) -> None: ...

class ShareWeightsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShareWeightsResponse(_message.Message):
    __slots__ = ("socket_path", "boot_id", "model_hash")
    SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    socket_path: str
    boot_id: str
    model_hash: str
    def __init__(self, socket_path: _Optional[str] = ..., boot_id: _Optional[str] = ..., model_hash: _Optional[str] = ...) -> None: ...

class ChecksumWeightsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChecksumWeightsResponse(_message.Message):
    __slots__ = ("sha256", "num_bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    num_bytes: int
    def __init__(self, sha256: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class PrepareAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: _common_pb2.AdapterRef
    def __init__(self, adapter: _Optional[_Union[_common_pb2.AdapterRef, _Mapping]] = ...) -> None: ...

class PrepareAdapterResponse(_message.Message):
    __slots__ = ("slot", "was_loaded", "seconds")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WAS_LOADED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    was_loaded: bool
    seconds: float
    def __init__(self, slot: _Optional[int] = ..., was_loaded: bool = ..., seconds: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("deadline_s",)
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    deadline_s: float
    def __init__(self, deadline_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_finished", "num_aborted")
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_ABORTED_FIELD_NUMBER: _ClassVar[int]
    num_finished: int
    num_aborted: int
    def __init__(self, num_finished: _Optional[int] = ..., num_aborted: _Optional[int] = ...) -> None: ...
