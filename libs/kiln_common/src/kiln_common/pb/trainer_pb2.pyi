from google.protobuf import field_mask_pb2 as _field_mask_pb2
from kiln_common.pb import common_pb2 as _common_pb2
from kiln_common.pb import engine_pb2 as _engine_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoraConfig(_message.Message):
    __slots__ = ("rank", "alpha", "targets", "dropout")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    dropout: float
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., dropout: _Optional[float] = ...) -> None: ...

class OptimizerConfig(_message.Message):
    __slots__ = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio", "schedule", "adam_beta1", "adam_beta2", "adam_eps", "type")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    WARMUP_RATIO_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    ADAM_BETA1_FIELD_NUMBER: _ClassVar[int]
    ADAM_BETA2_FIELD_NUMBER: _ClassVar[int]
    ADAM_EPS_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    warmup_ratio: float
    schedule: str
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    type: str
    def __init__(self, learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., warmup_ratio: _Optional[float] = ..., schedule: _Optional[str] = ..., adam_beta1: _Optional[float] = ..., adam_beta2: _Optional[float] = ..., adam_eps: _Optional[float] = ..., type: _Optional[str] = ...) -> None: ...

class JobConfig(_message.Message):
    __slots__ = ("adapter", "base_adapter", "start_fresh", "lora", "optimizer", "epochs", "batch_tokens", "gradient_accumulation", "seed", "checkpoint_every", "attach", "metadata_json", "publish", "priority", "gate", "train_mtp")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BASE_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    START_FRESH_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_MTP_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    base_adapter: str
    start_fresh: bool
    lora: LoraConfig
    optimizer: OptimizerConfig
    epochs: int
    batch_tokens: int
    gradient_accumulation: int
    seed: int
    checkpoint_every: int
    attach: bool
    metadata_json: str
    publish: str
    priority: int
    gate: Gate
    train_mtp: bool
    def __init__(self, adapter: _Optional[str] = ..., base_adapter: _Optional[str] = ..., start_fresh: bool = ..., lora: _Optional[_Union[LoraConfig, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerConfig, _Mapping]] = ..., epochs: _Optional[int] = ..., batch_tokens: _Optional[int] = ..., gradient_accumulation: _Optional[int] = ..., seed: _Optional[int] = ..., checkpoint_every: _Optional[int] = ..., attach: bool = ..., metadata_json: _Optional[str] = ..., publish: _Optional[str] = ..., priority: _Optional[int] = ..., gate: _Optional[_Union[Gate, _Mapping]] = ..., train_mtp: bool = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("suite_id", "suite", "min_score", "settings_json", "owner", "timeout_s")
    SUITE_ID_FIELD_NUMBER: _ClassVar[int]
    SUITE_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    suite_id: str
    suite: str
    min_score: float
    settings_json: str
    owner: str
    timeout_s: float
    def __init__(self, suite_id: _Optional[str] = ..., suite: _Optional[str] = ..., min_score: _Optional[float] = ..., settings_json: _Optional[str] = ..., owner: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class SftExample(_message.Message):
    __slots__ = ("token_ids", "loss_weights")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    loss_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., loss_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class SftSpec(_message.Message):
    __slots__ = ("examples",)
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    examples: _containers.RepeatedCompositeFieldContainer[SftExample]
    def __init__(self, examples: _Optional[_Iterable[_Union[SftExample, _Mapping]]] = ...) -> None: ...

class GrpoRollout(_message.Message):
    __slots__ = ("prompt_token_ids", "completion_token_ids", "reward", "behaviour_logprobs", "temperature", "source", "adapter_version", "completion_id", "index", "is_truncated")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOUR_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    IS_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    completion_token_ids: _containers.RepeatedScalarFieldContainer[int]
    reward: float
    behaviour_logprobs: _containers.RepeatedScalarFieldContainer[float]
    temperature: float
    source: str
    adapter_version: str
    completion_id: str
    index: int
    is_truncated: bool
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., completion_token_ids: _Optional[_Iterable[int]] = ..., reward: _Optional[float] = ..., behaviour_logprobs: _Optional[_Iterable[float]] = ..., temperature: _Optional[float] = ..., source: _Optional[str] = ..., adapter_version: _Optional[str] = ..., completion_id: _Optional[str] = ..., index: _Optional[int] = ..., is_truncated: bool = ...) -> None: ...

class GrpoGroup(_message.Message):
    __slots__ = ("rollouts",)
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    rollouts: _containers.RepeatedCompositeFieldContainer[GrpoRollout]
    def __init__(self, rollouts: _Optional[_Iterable[_Union[GrpoRollout, _Mapping]]] = ...) -> None: ...

class GrpoLoss(_message.Message):
    __slots__ = ("type", "clip_low", "clip_high", "kl_coef", "kl_estimator", "importance_mode", "importance_cap", "scale_rewards", "mask_truncated_completions")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CLIP_LOW_FIELD_NUMBER: _ClassVar[int]
    CLIP_HIGH_FIELD_NUMBER: _ClassVar[int]
    KL_COEF_FIELD_NUMBER: _ClassVar[int]
    KL_ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_MODE_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_CAP_FIELD_NUMBER: _ClassVar[int]
    SCALE_REWARDS_FIELD_NUMBER: _ClassVar[int]
    MASK_TRUNCATED_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    type: str
    clip_low: float
    clip_high: float
    kl_coef: float
    kl_estimator: str
    importance_mode: str
    importance_cap: float
    scale_rewards: str
    mask_truncated_completions: bool
    def __init__(self, type: _Optional[str] = ..., clip_low: _Optional[float] = ..., clip_high: _Optional[float] = ..., kl_coef: _Optional[float] = ..., kl_estimator: _Optional[str] = ..., importance_mode: _Optional[str] = ..., importance_cap: _Optional[float] = ..., scale_rewards: _Optional[str] = ..., mask_truncated_completions: bool = ...) -> None: ...

class GrpoSpec(_message.Message):
    __slots__ = ("groups", "loss")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GrpoGroup]
    loss: GrpoLoss
    def __init__(self, groups: _Optional[_Iterable[_Union[GrpoGroup, _Mapping]]] = ..., loss: _Optional[_Union[GrpoLoss, _Mapping]] = ...) -> None: ...

class OpdSettings(_message.Message):
    __slots__ = ("teacher", "divergence", "beta", "sampling", "samples_per_prompt", "prompts_per_step", "refresh_every", "teacher_model")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_PROMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    REFRESH_EVERY_FIELD_NUMBER: _ClassVar[int]
    TEACHER_MODEL_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    divergence: str
    beta: float
    sampling: _engine_pb2.SamplingParams
    samples_per_prompt: int
    prompts_per_step: int
    refresh_every: int
    teacher_model: TeacherModel
    def __init__(self, teacher: _Optional[str] = ..., divergence: _Optional[str] = ..., beta: _Optional[float] = ..., sampling: _Optional[_Union[_engine_pb2.SamplingParams, _Mapping]] = ..., samples_per_prompt: _Optional[int] = ..., prompts_per_step: _Optional[int] = ..., refresh_every: _Optional[int] = ..., teacher_model: _Optional[_Union[TeacherModel, _Mapping]] = ...) -> None: ...

class TeacherModel(_message.Message):
    __slots__ = ("model_id", "model_hash", "top_k")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    model_hash: str
    top_k: int
    def __init__(self, model_id: _Optional[str] = ..., model_hash: _Optional[str] = ..., top_k: _Optional[int] = ...) -> None: ...

class OpdPrompt(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class OpdRollout(_message.Message):
    __slots__ = ("prompt_token_ids", "completion_token_ids", "logprobs", "is_truncated", "source", "adapter_version")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IS_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    completion_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    is_truncated: bool
    source: str
    adapter_version: str
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., completion_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., is_truncated: bool = ..., source: _Optional[str] = ..., adapter_version: _Optional[str] = ...) -> None: ...

class OpdSpec(_message.Message):
    __slots__ = ("settings", "prompts", "rollouts")
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    settings: OpdSettings
    prompts: _containers.RepeatedCompositeFieldContainer[OpdPrompt]
    rollouts: _containers.RepeatedCompositeFieldContainer[OpdRollout]
    def __init__(self, settings: _Optional[_Union[OpdSettings, _Mapping]] = ..., prompts: _Optional[_Iterable[_Union[OpdPrompt, _Mapping]]] = ..., rollouts: _Optional[_Iterable[_Union[OpdRollout, _Mapping]]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("config", "sft", "grpo", "opd", "idempotency_key", "base_model_hash", "owner", "retry_of", "dataset", "webhook", "correction_ids")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SFT_FIELD_NUMBER: _ClassVar[int]
    GRPO_FIELD_NUMBER: _ClassVar[int]
    OPD_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    RETRY_OF_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_IDS_FIELD_NUMBER: _ClassVar[int]
    config: JobConfig
    sft: SftSpec
    grpo: GrpoSpec
    opd: OpdSpec
    idempotency_key: str
    base_model_hash: str
    owner: str
    retry_of: str
    dataset: DatasetRef
    webhook: Webhook
    correction_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, config: _Optional[_Union[JobConfig, _Mapping]] = ..., sft: _Optional[_Union[SftSpec, _Mapping]] = ..., grpo: _Optional[_Union[GrpoSpec, _Mapping]] = ..., opd: _Optional[_Union[OpdSpec, _Mapping]] = ..., idempotency_key: _Optional[str] = ..., base_model_hash: _Optional[str] = ..., owner: _Optional[str] = ..., retry_of: _Optional[str] = ..., dataset: _Optional[_Union[DatasetRef, _Mapping]] = ..., webhook: _Optional[_Union[Webhook, _Mapping]] = ..., correction_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SubmitPart(_message.Message):
    __slots__ = ("settings", "sft_example", "grpo_group", "opd_prompt", "opd_rollout")
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SFT_EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    GRPO_GROUP_FIELD_NUMBER: _ClassVar[int]
    OPD_PROMPT_FIELD_NUMBER: _ClassVar[int]
    OPD_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    settings: SubmitRequest
    sft_example: SftExample
    grpo_group: GrpoGroup
    opd_prompt: OpdPrompt
    opd_rollout: OpdRollout
    def __init__(self, settings: _Optional[_Union[SubmitRequest, _Mapping]] = ..., sft_example: _Optional[_Union[SftExample, _Mapping]] = ..., grpo_group: _Optional[_Union[GrpoGroup, _Mapping]] = ..., opd_prompt: _Optional[_Union[OpdPrompt, _Mapping]] = ..., opd_rollout: _Optional[_Union[OpdRollout, _Mapping]] = ...) -> None: ...

class Webhook(_message.Message):
    __slots__ = ("url", "secret")
    URL_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    url: str
    secret: str
    def __init__(self, url: _Optional[str] = ..., secret: _Optional[str] = ...) -> None: ...

class WebhookState(_message.Message):
    __slots__ = ("url", "status", "num_attempts", "error")
    URL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    url: str
    status: str
    num_attempts: int
    error: str
    def __init__(self, url: _Optional[str] = ..., status: _Optional[str] = ..., num_attempts: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class DatasetRef(_message.Message):
    __slots__ = ("id", "sha256")
    ID_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    id: str
    sha256: str
    def __init__(self, id: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class RetryJobRequest(_message.Message):
    __slots__ = ("id", "changes", "changed", "idempotency_key", "owner", "webhook")
    ID_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_FIELD_NUMBER: _ClassVar[int]
    id: str
    changes: JobConfig
    changed: _field_mask_pb2.FieldMask
    idempotency_key: str
    owner: str
    webhook: Webhook
    def __init__(self, id: _Optional[str] = ..., changes: _Optional[_Union[JobConfig, _Mapping]] = ..., changed: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ..., idempotency_key: _Optional[str] = ..., owner: _Optional[str] = ..., webhook: _Optional[_Union[Webhook, _Mapping]] = ...) -> None: ...

class JobProgress(_message.Message):
    __slots__ = ("step", "num_steps", "num_tokens", "eta_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    num_steps: int
    num_tokens: int
    eta_s: float
    def __init__(self, step: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., eta_s: _Optional[float] = ...) -> None: ...

class JobResult(_message.Message):
    __slots__ = ("adapter", "version", "sha256", "not_live", "swap_s", "gate")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NOT_LIVE_FIELD_NUMBER: _ClassVar[int]
    SWAP_S_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    version: int
    sha256: str
    not_live: _containers.RepeatedScalarFieldContainer[str]
    swap_s: float
    gate: GateOutcome
    def __init__(self, adapter: _Optional[str] = ..., version: _Optional[int] = ..., sha256: _Optional[str] = ..., not_live: _Optional[_Iterable[str]] = ..., swap_s: _Optional[float] = ..., gate: _Optional[_Union[GateOutcome, _Mapping]] = ...) -> None: ...

class GateOutcome(_message.Message):
    __slots__ = ("passed", "reason", "run_id", "suite", "min_score", "score")
    PASSED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SUITE_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    passed: bool
    reason: str
    run_id: str
    suite: str
    min_score: float
    score: float
    def __init__(self, passed: bool = ..., reason: _Optional[str] = ..., run_id: _Optional[str] = ..., suite: _Optional[str] = ..., min_score: _Optional[float] = ..., score: _Optional[float] = ...) -> None: ...

class JobError(_message.Message):
    __slots__ = ("code", "message", "hint")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    hint: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "kind", "status", "config", "progress", "metrics", "error", "result", "created_at_s", "started_at_s", "finished_at_s", "queue_position", "resolved_base_adapter", "claim_epoch", "sources", "payload_sha256", "grpo_loss", "history", "opd_settings", "owner", "retry_of", "published", "base_model_hash", "base_adapter_sha256", "data_sha256", "environment", "dataset", "correction_ids", "webhook", "sampled_by")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class SourcesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class SampledByEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_BASE_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CLAIM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    GRPO_LOSS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    OPD_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    RETRY_OF_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    BASE_ADAPTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_SHA256_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_IDS_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_BY_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    status: str
    config: JobConfig
    progress: JobProgress
    metrics: _containers.ScalarMap[str, float]
    error: JobError
    result: JobResult
    created_at_s: float
    started_at_s: float
    finished_at_s: float
    queue_position: int
    resolved_base_adapter: str
    claim_epoch: int
    sources: _containers.ScalarMap[str, int]
    payload_sha256: str
    grpo_loss: GrpoLoss
    history: _containers.RepeatedCompositeFieldContainer[StepMetrics]
    opd_settings: OpdSettings
    owner: str
    retry_of: str
    published: _containers.RepeatedCompositeFieldContainer[PublishedVersion]
    base_model_hash: str
    base_adapter_sha256: str
    data_sha256: str
    environment: _containers.ScalarMap[str, str]
    dataset: DatasetRef
    correction_ids: _containers.RepeatedScalarFieldContainer[str]
    webhook: WebhookState
    sampled_by: _containers.ScalarMap[str, int]
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., status: _Optional[str] = ..., config: _Optional[_Union[JobConfig, _Mapping]] = ..., progress: _Optional[_Union[JobProgress, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., error: _Optional[_Union[JobError, _Mapping]] = ..., result: _Optional[_Union[JobResult, _Mapping]] = ..., created_at_s: _Optional[float] = ..., started_at_s: _Optional[float] = ..., finished_at_s: _Optional[float] = ..., queue_position: _Optional[int] = ..., resolved_base_adapter: _Optional[str] = ..., claim_epoch: _Optional[int] = ..., sources: _Optional[_Mapping[str, int]] = ..., payload_sha256: _Optional[str] = ..., grpo_loss: _Optional[_Union[GrpoLoss, _Mapping]] = ..., history: _Optional[_Iterable[_Union[StepMetrics, _Mapping]]] = ..., opd_settings: _Optional[_Union[OpdSettings, _Mapping]] = ..., owner: _Optional[str] = ..., retry_of: _Optional[str] = ..., published: _Optional[_Iterable[_Union[PublishedVersion, _Mapping]]] = ..., base_model_hash: _Optional[str] = ..., base_adapter_sha256: _Optional[str] = ..., data_sha256: _Optional[str] = ..., environment: _Optional[_Mapping[str, str]] = ..., dataset: _Optional[_Union[DatasetRef, _Mapping]] = ..., correction_ids: _Optional[_Iterable[str]] = ..., webhook: _Optional[_Union[WebhookState, _Mapping]] = ..., sampled_by: _Optional[_Mapping[str, int]] = ...) -> None: ...

class PublishedVersion(_message.Message):
    __slots__ = ("step", "adapter", "version", "sha256")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    step: int
    adapter: str
    version: int
    sha256: str
    def __init__(self, step: _Optional[int] = ..., adapter: _Optional[str] = ..., version: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class StepMetrics(_message.Message):
    __slots__ = ("step", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    step: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("limit", "statuses", "owner")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    statuses: _containers.RepeatedScalarFieldContainer[str]
    owner: str
    def __init__(self, limit: _Optional[int] = ..., statuses: _Optional[_Iterable[str]] = ..., owner: _Optional[str] = ...) -> None: ...

class ListQueueRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("id", "discard_published")
    ID_FIELD_NUMBER: _ClassVar[int]
    DISCARD_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    id: str
    discard_published: bool
    def __init__(self, id: _Optional[str] = ..., discard_published: bool = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("id", "after_event_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    after_event_id: str
    def __init__(self, id: _Optional[str] = ..., after_event_id: _Optional[str] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("id", "type", "data_json", "at_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_JSON_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    type: str
    data_json: str
    at_s: float
    def __init__(self, id: _Optional[str] = ..., type: _Optional[str] = ..., data_json: _Optional[str] = ..., at_s: _Optional[float] = ...) -> None: ...

class GetTrainerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrainerStatus(_message.Message):
    __slots__ = ("trainer_id", "running_job_id", "num_queued", "engine_boot_id", "model_hash", "num_borrowed_bytes", "num_allocated_base_bytes", "gpu_sharing", "gpu_share", "gpu_sms", "num_device_bytes", "num_jobs_ended", "num_trained_tokens", "step_seconds", "swap_seconds", "metrics")
    class NumJobsEndedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TRAINER_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    ENGINE_BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_BORROWED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ALLOCATED_BASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_SHARING_FIELD_NUMBER: _ClassVar[int]
    GPU_SHARE_FIELD_NUMBER: _ClassVar[int]
    GPU_SMS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_JOBS_ENDED_FIELD_NUMBER: _ClassVar[int]
    NUM_TRAINED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SWAP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    trainer_id: str
    running_job_id: str
    num_queued: int
    engine_boot_id: str
    model_hash: str
    num_borrowed_bytes: int
    num_allocated_base_bytes: int
    gpu_sharing: str
    gpu_share: float
    gpu_sms: int
    num_device_bytes: int
    num_jobs_ended: _containers.ScalarMap[str, int]
    num_trained_tokens: int
    step_seconds: _common_pb2.Histogram
    swap_seconds: _common_pb2.Histogram
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, trainer_id: _Optional[str] = ..., running_job_id: _Optional[str] = ..., num_queued: _Optional[int] = ..., engine_boot_id: _Optional[str] = ..., model_hash: _Optional[str] = ..., num_borrowed_bytes: _Optional[int] = ..., num_allocated_base_bytes: _Optional[int] = ..., gpu_sharing: _Optional[str] = ..., gpu_share: _Optional[float] = ..., gpu_sms: _Optional[int] = ..., num_device_bytes: _Optional[int] = ..., num_jobs_ended: _Optional[_Mapping[str, int]] = ..., num_trained_tokens: _Optional[int] = ..., step_seconds: _Optional[_Union[_common_pb2.Histogram, _Mapping]] = ..., swap_seconds: _Optional[_Union[_common_pb2.Histogram, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...
