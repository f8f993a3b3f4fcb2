from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EvalSuite(_message.Message):
    __slots__ = ("id", "name", "version", "sha256", "num_cases", "created_at_s", "content")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_CASES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    version: int
    sha256: str
    num_cases: int
    created_at_s: float
    content: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[int] = ..., sha256: _Optional[str] = ..., num_cases: _Optional[int] = ..., created_at_s: _Optional[float] = ..., content: _Optional[str] = ...) -> None: ...

class PutSuiteRequest(_message.Message):
    __slots__ = ("owner", "name", "content", "num_cases")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    NUM_CASES_FIELD_NUMBER: _ClassVar[int]
    owner: str
    name: str
    content: str
    num_cases: int
    def __init__(self, owner: _Optional[str] = ..., name: _Optional[str] = ..., content: _Optional[str] = ..., num_cases: _Optional[int] = ...) -> None: ...

class GetSuiteRequest(_message.Message):
    __slots__ = ("owner", "reference", "with_content")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    WITH_CONTENT_FIELD_NUMBER: _ClassVar[int]
    owner: str
    reference: str
    with_content: bool
    def __init__(self, owner: _Optional[str] = ..., reference: _Optional[str] = ..., with_content: bool = ...) -> None: ...

class ListSuitesRequest(_message.Message):
    __slots__ = ("owner",)
    OWNER_FIELD_NUMBER: _ClassVar[int]
    owner: str
    def __init__(self, owner: _Optional[str] = ...) -> None: ...

class ListSuitesResponse(_message.Message):
    __slots__ = ("suites",)
    SUITES_FIELD_NUMBER: _ClassVar[int]
    suites: _containers.RepeatedCompositeFieldContainer[EvalSuite]
    def __init__(self, suites: _Optional[_Iterable[_Union[EvalSuite, _Mapping]]] = ...) -> None: ...

class EvalCase(_message.Message):
    __slots__ = ("index", "score", "is_valid", "answer", "detail")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    IS_VALID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    index: int
    score: float
    is_valid: bool
    answer: str
    detail: str
    def __init__(self, index: _Optional[int] = ..., score: _Optional[float] = ..., is_valid: bool = ..., answer: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class EvalError(_message.Message):
    __slots__ = ("code", "message", "hint")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    hint: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class EvalRun(_message.Message):
    __slots__ = ("id", "owner", "suite", "adapter", "settings_json", "status", "error", "summary_json", "num_done", "created_at_s", "started_at_s", "finished_at_s", "job_id", "claim_epoch", "cases")
    ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SUITE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_JSON_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_S_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CLAIM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CASES_FIELD_NUMBER: _ClassVar[int]
    id: str
    owner: str
    suite: EvalSuite
    adapter: str
    settings_json: str
    status: str
    error: EvalError
    summary_json: str
    num_done: int
    created_at_s: float
    started_at_s: float
    finished_at_s: float
    job_id: str
    claim_epoch: int
    cases: _containers.RepeatedCompositeFieldContainer[EvalCase]
    def __init__(self, id: _Optional[str] = ..., owner: _Optional[str] = ..., suite: _Optional[_Union[EvalSuite, _Mapping]] = ..., adapter: _Optional[str] = ..., settings_json: _Optional[str] = ..., status: _Optional[str] = ..., error: _Optional[_Union[EvalError, _Mapping]] = ..., summary_json: _Optional[str] = ..., num_done: _Optional[int] = ..., created_at_s: _Optional[float] = ..., started_at_s: _Optional[float] = ..., finished_at_s: _Optional[float] = ..., job_id: _Optional[str] = ..., claim_epoch: _Optional[int] = ..., cases: _Optional[_Iterable[_Union[EvalCase, _Mapping]]] = ...) -> None: ...

class SubmitRunRequest(_message.Message):
    __slots__ = ("owner", "suite_id", "adapter", "settings_json", "job_id", "idempotency_key")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SUITE_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    owner: str
    suite_id: str
    adapter: str
    settings_json: str
    job_id: str
    idempotency_key: str
    def __init__(self, owner: _Optional[str] = ..., suite_id: _Optional[str] = ..., adapter: _Optional[str] = ..., settings_json: _Optional[str] = ..., job_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("id", "owner", "with_cases")
    ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    WITH_CASES_FIELD_NUMBER: _ClassVar[int]
    id: str
    owner: str
    with_cases: bool
    def __init__(self, id: _Optional[str] = ..., owner: _Optional[str] = ..., with_cases: bool = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("owner", "adapters", "statuses", "limit")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    owner: str
    adapters: _containers.RepeatedScalarFieldContainer[str]
    statuses: _containers.RepeatedScalarFieldContainer[str]
    limit: int
    def __init__(self, owner: _Optional[str] = ..., adapters: _Optional[_Iterable[str]] = ..., statuses: _Optional[_Iterable[str]] = ..., limit: _Optional[int] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[EvalRun]
    def __init__(self, runs: _Optional[_Iterable[_Union[EvalRun, _Mapping]]] = ...) -> None: ...

class DeleteRunRequest(_message.Message):
    __slots__ = ("id", "owner")
    ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    id: str
    owner: str
    def __init__(self, id: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class DeleteRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClaimRunRequest(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...

class ClaimRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: EvalRun
    def __init__(self, run: _Optional[_Union[EvalRun, _Mapping]] = ...) -> None: ...

class ReportCasesRequest(_message.Message):
    __slots__ = ("run_id", "claim_epoch", "cases", "lease_s")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLAIM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CASES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    claim_epoch: int
    cases: _containers.RepeatedCompositeFieldContainer[EvalCase]
    lease_s: float
    def __init__(self, run_id: _Optional[str] = ..., claim_epoch: _Optional[int] = ..., cases: _Optional[_Iterable[_Union[EvalCase, _Mapping]]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class ReportCasesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FinishRunRequest(_message.Message):
    __slots__ = ("run_id", "claim_epoch", "summary_json", "error")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLAIM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_JSON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    claim_epoch: int
    summary_json: str
    error: EvalError
    def __init__(self, run_id: _Optional[str] = ..., claim_epoch: _Optional[int] = ..., summary_json: _Optional[str] = ..., error: _Optional[_Union[EvalError, _Mapping]] = ...) -> None: ...
