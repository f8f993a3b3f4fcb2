from kiln_common.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterBaseModelRequest(_message.Message):
    __slots__ = ("base_model", "max_adapter_rank")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_RANK_FIELD_NUMBER: _ClassVar[int]
    base_model: _common_pb2.BaseModel
    max_adapter_rank: int
    def __init__(self, base_model: _Optional[_Union[_common_pb2.BaseModel, _Mapping]] = ..., max_adapter_rank: _Optional[int] = ...) -> None: ...

class RegisterBaseModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PublishHeader(_message.Message):
    __slots__ = ("name", "base_model_hash", "config_json", "parent_version", "parent_name", "job_id", "publish_key", "claim_epoch", "attach", "metrics_json", "sha256", "data_sha256", "owner")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    PARENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_NAME_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_KEY_FIELD_NUMBER: _ClassVar[int]
    CLAIM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_SHA256_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    name: str
    base_model_hash: str
    config_json: str
    parent_version: int
    parent_name: str
    job_id: str
    publish_key: str
    claim_epoch: int
    attach: bool
    metrics_json: str
    sha256: str
    data_sha256: str
    owner: str
    def __init__(self, name: _Optional[str] = ..., base_model_hash: _Optional[str] = ..., config_json: _Optional[str] = ..., parent_version: _Optional[int] = ..., parent_name: _Optional[str] = ..., job_id: _Optional[str] = ..., publish_key: _Optional[str] = ..., claim_epoch: _Optional[int] = ..., attach: bool = ..., metrics_json: _Optional[str] = ..., sha256: _Optional[str] = ..., data_sha256: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PublishHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[PublishHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class AwaitPublishRequest(_message.Message):
    __slots__ = ("name", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class AdapterVersion(_message.Message):
    __slots__ = ("name", "version", "sha256", "num_bytes", "rank", "alpha", "targets", "parent_name", "parent_version", "job_id", "base_model_hash", "metrics_json", "config_json", "created_at_s", "rolled_back_over", "data_sha256", "merge_mode", "merged_from", "source_sha256", "owner")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    PARENT_NAME_FIELD_NUMBER: _ClassVar[int]
    PARENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    ROLLED_BACK_OVER_FIELD_NUMBER: _ClassVar[int]
    DATA_SHA256_FIELD_NUMBER: _ClassVar[int]
    MERGE_MODE_FIELD_NUMBER: _ClassVar[int]
    MERGED_FROM_FIELD_NUMBER: _ClassVar[int]
    SOURCE_SHA256_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    sha256: str
    num_bytes: int
    rank: int
    alpha: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    parent_name: str
    parent_version: int
    job_id: str
    base_model_hash: str
    metrics_json: str
    config_json: str
    created_at_s: float
    rolled_back_over: int
    data_sha256: str
    merge_mode: str
    merged_from: _containers.RepeatedCompositeFieldContainer[MergeSource]
    source_sha256: str
    owner: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., sha256: _Optional[str] = ..., num_bytes: _Optional[int] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., parent_name: _Optional[str] = ..., parent_version: _Optional[int] = ..., job_id: _Optional[str] = ..., base_model_hash: _Optional[str] = ..., metrics_json: _Optional[str] = ..., config_json: _Optional[str] = ..., created_at_s: _Optional[float] = ..., rolled_back_over: _Optional[int] = ..., data_sha256: _Optional[str] = ..., merge_mode: _Optional[str] = ..., merged_from: _Optional[_Iterable[_Union[MergeSource, _Mapping]]] = ..., source_sha256: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class MergeSource(_message.Message):
    __slots__ = ("name", "version", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    weight: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "versions", "latest_version", "attached_version", "owner")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LATEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_VERSION_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    name: str
    versions: _containers.RepeatedCompositeFieldContainer[AdapterVersion]
    latest_version: int
    attached_version: int
    owner: str
    def __init__(self, name: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[AdapterVersion, _Mapping]]] = ..., latest_version: _Optional[int] = ..., attached_version: _Optional[int] = ..., owner: _Optional[str] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("reference",)
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    def __init__(self, reference: _Optional[str] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class FetchChunk(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class SetDefaultRequest(_message.Message):
    __slots__ = ("reference", "actor")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    reference: str
    actor: str
    def __init__(self, reference: _Optional[str] = ..., actor: _Optional[str] = ...) -> None: ...

class SetDefaultResponse(_message.Message):
    __slots__ = ("attached",)
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    attached: AdapterVersion
    def __init__(self, attached: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class GetDefaultRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDefaultResponse(_message.Message):
    __slots__ = ("attached",)
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    attached: AdapterVersion
    def __init__(self, attached: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class CheckPublishRequest(_message.Message):
    __slots__ = ("name", "owner")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    name: str
    owner: str
    def __init__(self, name: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class CheckPublishResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("holder", "references", "for_s")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    FOR_S_FIELD_NUMBER: _ClassVar[int]
    holder: str
    references: _containers.RepeatedScalarFieldContainer[str]
    for_s: float
    def __init__(self, holder: _Optional[str] = ..., references: _Optional[_Iterable[str]] = ..., for_s: _Optional[float] = ...) -> None: ...

class HoldResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAuditRequest(_message.Message):
    __slots__ = ("name", "before_id", "limit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BEFORE_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    before_id: int
    limit: int
    def __init__(self, name: _Optional[str] = ..., before_id: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class AuditEntry(_message.Message):
    __slots__ = ("id", "at_s", "actor", "action", "name", "version", "detail_json")
    ID_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DETAIL_JSON_FIELD_NUMBER: _ClassVar[int]
    id: int
    at_s: float
    actor: str
    action: str
    name: str
    version: int
    detail_json: str
    def __init__(self, id: _Optional[int] = ..., at_s: _Optional[float] = ..., actor: _Optional[str] = ..., action: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[int] = ..., detail_json: _Optional[str] = ...) -> None: ...

class ListAuditResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[AuditEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[AuditEntry, _Mapping]]] = ...) -> None: ...

class RollBackRequest(_message.Message):
    __slots__ = ("name", "version", "may_move_default", "actor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAY_MOVE_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    may_move_default: bool
    actor: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., may_move_default: bool = ..., actor: _Optional[str] = ...) -> None: ...

class RollBackResponse(_message.Message):
    __slots__ = ("version", "has_moved_default")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HAS_MOVED_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    has_moved_default: bool
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., has_moved_default: bool = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("earlier", "later")
    EARLIER_FIELD_NUMBER: _ClassVar[int]
    LATER_FIELD_NUMBER: _ClassVar[int]
    earlier: str
    later: str
    def __init__(self, earlier: _Optional[str] = ..., later: _Optional[str] = ...) -> None: ...

class ModuleComparison(_message.Message):
    __slots__ = ("path", "norm_earlier", "norm_later", "norm_change", "inner_product")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NORM_EARLIER_FIELD_NUMBER: _ClassVar[int]
    NORM_LATER_FIELD_NUMBER: _ClassVar[int]
    NORM_CHANGE_FIELD_NUMBER: _ClassVar[int]
    INNER_PRODUCT_FIELD_NUMBER: _ClassVar[int]
    path: str
    norm_earlier: float
    norm_later: float
    norm_change: float
    inner_product: float
    def __init__(self, path: _Optional[str] = ..., norm_earlier: _Optional[float] = ..., norm_later: _Optional[float] = ..., norm_change: _Optional[float] = ..., inner_product: _Optional[float] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("earlier", "later", "modules")
    EARLIER_FIELD_NUMBER: _ClassVar[int]
    LATER_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    earlier: AdapterVersion
    later: AdapterVersion
    modules: _containers.RepeatedCompositeFieldContainer[ModuleComparison]
    def __init__(self, earlier: _Optional[_Union[AdapterVersion, _Mapping]] = ..., later: _Optional[_Union[AdapterVersion, _Mapping]] = ..., modules: _Optional[_Iterable[_Union[ModuleComparison, _Mapping]]] = ...) -> None: ...

class MergeRequest(_message.Message):
    __slots__ = ("sources", "mode", "output", "density", "publish_key", "owner")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[MergeSource]
    mode: str
    output: str
    density: float
    publish_key: str
    owner: str
    def __init__(self, sources: _Optional[_Iterable[_Union[MergeSource, _Mapping]]] = ..., mode: _Optional[str] = ..., output: _Optional[str] = ..., density: _Optional[float] = ..., publish_key: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class DeleteVersionRequest(_message.Message):
    __slots__ = ("name", "version", "actor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    actor: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., actor: _Optional[str] = ...) -> None: ...

class DeleteVersionResponse(_message.Message):
    __slots__ = ("num_deleted",)
    NUM_DELETED_FIELD_NUMBER: _ClassVar[int]
    num_deleted: int
    def __init__(self, num_deleted: _Optional[int] = ...) -> None: ...
