"""The model as the engine runs it: over KV pages and state slots."""

from kiln_engine.model.kv_store import KvStore, kv_page_bytes
from kiln_engine.model.linears import Linears
from kiln_engine.model.page_table import page_table_bytes
from kiln_engine.model.paged_model import PagedModel
from kiln_engine.model.prefill_layout import PrefillCapacity
from kiln_engine.model.state_store import StateStore, state_slot_bytes
from kiln_engine.model.step_layout import StepLayout
from kiln_engine.model.transfers import copy_to, to_device

__all__ = [
    "KvStore",
    "Linears",
    "PagedModel",
    "PrefillCapacity",
    "StateStore",
    "StepLayout",
    "copy_to",
    "kv_page_bytes",
    "page_table_bytes",
    "state_slot_bytes",
    "to_device",
]
