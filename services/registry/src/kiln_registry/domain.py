"""The registry's words: base models, immutable versions, and why a publish is refused.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kiln_common.errors import AdapterNotFound, ErrorKind, InvalidRequest, KilnError


class RegistryStorageFull(KilnError):
    """The registry's disk does not take what was sent. Nothing of it was kept."""

    code = "registry_storage_full"
    kind = ErrorKind.UNAVAILABLE
    hint = (
        "Make room on the disk of KILN_REGISTRY_STATE_DIR, or delete adapter versions; jobs wait meanwhile."
    )
    retry_after_s = 5.0


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear layer an adapter may change."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseModelRecord:
    """A base model some engine announced."""

    model_id: str
    model_hash: str
    # By path without ".weight", such as "model.layers.0.mlp.gate_proj"; the multi-token-prediction layers'
    # too, such as "mtp.fc".
    modules: dict[str, ModuleShape]
    # Highest rank its engine can load; 0 where the engine did not say.
    max_adapter_rank: int = 0


def is_draft(module_path: str) -> bool:
    """Whether a layer is one of the multi-token prediction, which drafts and decides nothing."""
    return module_path.startswith("mtp.")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The parts of adapter_config.json that decide what the tensors mean."""

    rank: int
    alpha: float
    # None when the file gives a pattern instead of a list.
    target_modules: tuple[str, ...] | None
    # Whether every layer that target_modules names must have tensors.
    covers_all_layers: bool


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """What the check of an adapter found."""

    rank: int
    alpha: float
    # Last path parts of the adapted modules, sorted.
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Bytes that are on disk under their hash."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Publication:
    """Everything a new version records, but its number."""

    name: str
    base_model_hash: str
    config_json: str
    blob: StoredBlob
    inspected: InspectedAdapter
    parent_name: str = ""
    parent_version: int = 0
    job_id: str = ""
    publish_key: str = ""
    claim_epoch: int = 0
    attach: bool = False
    metrics_json: str = ""
    data_sha256: str = ""
    merge_json: str = ""
    source_sha256: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One published version."""

    name: str
    version: int
    sha256: str
    num_bytes: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    parent_name: str
    parent_version: int
    job_id: str
    base_model_hash: str
    metrics_json: str
    config_json: str
    created_at_s: float
    data_sha256: str  # of what it was trained on; "" for none
    merge_json: str  # {"mode", "sources"} where it was merged from others; else ""
    source_sha256: str  # of the bytes as they were published
    owner: str  # whom the name belongs to; "" where nobody was told apart
    # Where the bare name means this version since a rollback (see schema): the highest number then.
    rolled_back_over: int = 0


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name and its versions, ascending."""

    name: str
    versions: tuple[VersionRecord, ...]
    latest_version: int
    attached_version: int  # 0 for none
    owner: str


@dataclass(frozen=True, slots=True)
class RegistryEvent:
    """A fact for Redis: "AdapterPublished", "AdapterRolledBack", "DefaultChanged" or "AdapterDeleted"."""

    id: int
    type: str
    data_json: str
    at_s: float


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Something that was done to an adapter, and who asked for it."""

    id: int
    at_s: float
    actor: str
    action: str
    name: str
    version: int
    detail_json: str


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept; 0 is no limit."""

    # Versions of a name beyond these, the oldest first, are collected when nothing needs them.
    keep_versions: int = 0
    # A publish beyond these is refused.
    max_versions: int = 0  # of a name
    max_bytes: int = 0  # of an owner
    # A version that was looked up within this time may be on its way to a request.
    grace_s: float = 60.0


class AdapterQuotaExceeded(KilnError):
    """One version more would exceed the versions a name, or the bytes a key, may have here."""

    code = "adapter_quota_exceeded"
    kind = ErrorKind.CONFLICT
    hint = "Delete versions that are not needed any more, or ask whoever runs the server for a higher limit."


class AdapterNameTaken(KilnError):
    """The name belongs to another key, or was made while no keys were configured."""

    code = "adapter_name_taken"
    kind = ErrorKind.CONFLICT
    hint = "Choose another name: a name gets new versions from the key that made it alone."

    def __init__(self, name: str) -> None:
        super().__init__(f"the adapter name {name[:140]!r} is taken")


class BlobNotFound(AdapterNotFound):
    """The registry has no bytes of this hash; the version may have been deleted meanwhile."""

    code = "blob_not_found"

    def __init__(self, sha256: str) -> None:
        super().__init__(f"no adapter bytes have the hash {sha256[:80]}")


class AdapterInUse(KilnError):
    """The adapter, or the version, that is to be deleted is the deployment's default."""

    code = "adapter_in_use"
    kind = ErrorKind.CONFLICT
    hint = "Detach it first: POST /v1/adapters/detach."


class DefaultNeedsAdmin(KilnError):
    """A rollback would move the default, which this caller may not."""

    code = "default_needs_admin"
    kind = ErrorKind.FORBIDDEN
    hint = "Ask with a key that carries the scope admin, or have one detach the default first."

    def __init__(self, attached: str, target: str) -> None:
        super().__init__(f"{attached} is the default; rolling back to {target} would change it for everybody")


class StaleClaim(KilnError):
    """A trainer that lost its claim tried to publish."""

    code = "stale_claim"
    kind = ErrorKind.CONFLICT
    hint = "Another trainer has the job now and publishes its result."


class VersionDeleted(KilnError):
    """What this publish made the first time has been deleted since."""

    code = "adapter_version_deleted"
    kind = ErrorKind.CONFLICT
    hint = "Publish under a new key to make a new version."


class UnknownBaseModel(InvalidRequest):
    """No engine has told the registry of the model that the adapter belongs to."""

    code = "unknown_base_model"
    hint = "Start an engine with that base model first; it announces the shapes adapters must have."


class InvalidBaseModel(InvalidRequest):
    """An engine's description of its model lacks what adapters are checked against."""

    code = "invalid_base_model"
    hint = "Only engines register base models; this one announced an incomplete table."


class InvalidPublish(InvalidRequest):
    """The stream of a publish is not a header followed by bytes."""

    code = "invalid_publish"
    hint = "Send one header, then the bytes of adapter_model.safetensors in chunks."


class Sha256Mismatch(InvalidRequest):
    """The bytes that arrived have another hash than the one that was sent with them."""

    code = "sha256_mismatch"
    hint = "The upload was damaged on its way; send it again."


class AdapterTooLarge(KilnError):
    """The adapter's file is larger than the registry takes (KILN_REGISTRY_MAX_ADAPTER_BYTES)."""

    code = "adapter_too_large"
    kind = ErrorKind.TOO_LARGE
    hint = "Lower the rank or adapt fewer modules."


class PickleRefused(InvalidRequest):
    """The adapter's weights are pickled, and unpickling runs whatever code is in the file."""

    code = "pickle_refused"
    hint = "Save the adapter as safetensors; a pickle can run code when it is read."


class InvalidSafetensors(InvalidRequest):
    """The file is damaged, cut off or no safetensors file."""

    code = "invalid_safetensors"
    hint = "Write the file with the safetensors library."


class InvalidAdapterConfig(InvalidRequest):
    """adapter_config.json is not a JSON object that describes a LoRA adapter."""

    code = "invalid_adapter_config"
    hint = "Send the adapter_config.json that PEFT's save_pretrained wrote."


class UnsupportedAdapterFeature(InvalidRequest):
    """adapter_config.json asks for a feature of PEFT that is not computed here."""

    code = "unsupported_adapter_feature"
    hint = "LoRA on linear layers is supported, rsLoRA and patterns included: train it again without this feature."


class UnexpectedTensor(InvalidRequest):
    """The adapter's file holds a tensor that belongs to no LoRA matrix."""

    code = "unexpected_tensor"
    hint = "An adapter holds `…lora_A.weight` and `…lora_B.weight` tensors and nothing else."


class IncompleteAdapter(InvalidRequest):
    """A module lacks one of its two matrices or both, or the file has none at all."""

    code = "incomplete_adapter"
    hint = "Each adapted module needs its lora_A.weight and its lora_B.weight."


class RankMismatch(InvalidRequest):
    """A tensor's rank is not the one that adapter_config.json gives."""

    code = "adapter_rank_mismatch"
    hint = "`r` in adapter_config.json must be the rank of every tensor."


class AdapterRankTooHigh(InvalidRequest):
    """The adapter's rank is higher than the engine's slots hold."""

    code = "adapter_rank_too_high"
    hint = "Train with a lower rank, or start the engine with a higher max_adapter_rank."

    def __init__(self, rank: int, limit: int) -> None:
        super().__init__(f"the adapter has rank {rank}, the engine holds up to {limit}")


class MergeRankTooHigh(AdapterRankTooHigh):
    """The ranks of what is concatenated add up to more than an engine holds."""

    hint = "Merge fewer adapters or lower ranks, use the mode linear or ties, or raise max_adapter_rank."

    def __init__(self, ranks: Sequence[int], limit: int) -> None:
        added = f"{' + '.join(map(str, ranks))} = {sum(ranks)}"
        InvalidRequest.__init__(self, f"the merged adapter has rank {added}, the engine holds up to {limit}")


class MergeRanksDiffer(InvalidRequest):
    """The adapters to merge have different ranks, and this mode adds matrices of one rank."""

    code = "merge_ranks_differ"
    hint = "Use the mode concat, which adds the ranks up, or merge adapters of one rank."


class InvalidMerge(InvalidRequest):
    """The merge has no sources, a weight that is 0 or not finite, or an unknown mode."""

    code = "invalid_merge"
    hint = "Name one or more sources with finite weights other than 0, and a mode: linear, ties or concat."


class UnsupportedDtype(InvalidRequest):
    """A tensor is of a number format that adapters are not kept in."""

    code = "unsupported_dtype"
    hint = "Save the adapter as float32, bfloat16 or float16."


class NotFinite(InvalidRequest):
    """NaN or infinity in a tensor."""

    code = "adapter_not_finite"
    hint = "The training that made it diverged; lower its learning rate."
