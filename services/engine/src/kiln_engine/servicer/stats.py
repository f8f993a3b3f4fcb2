"""The engine's figures as one message."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kiln_common.histogram import Histogram
from kiln_common.pb import common_pb2, engine_pb2
from kiln_engine.domain.device_memory import DeviceMemory
from kiln_engine.domain.ports import AdapterResidency, BaseWeights
from kiln_engine.loop import EngineLoop
from kiln_engine.servicer.intake import RequestIntake
from kiln_engine.speculation.speculator import DraftSpeculator


@dataclass(frozen=True)
class EngineFigures:
    """Where each figure of EngineStats comes from."""

    info: engine_pb2.EngineInfo
    loop: EngineLoop
    intake: RequestIntake
    adapters: AdapterResidency
    weights: BaseWeights
    adapter_load_seconds: Histogram
    memory: DeviceMemory
    # None without speculation.
    speculator: DraftSpeculator | None
    started_s: float

    def read(self) -> engine_pb2.EngineStats:
        """The figures now."""
        free_bytes, total_bytes = self.memory.read()
        stats = engine_pb2.EngineStats(
            **asdict(self.loop.stats),
            num_weight_leases=self.weights.num_leases,
            is_draining=self.intake.is_draining,
            uptime_s=self.intake.clock.now() - self.started_s,
            num_adapter_slots=self.info.num_adapter_slots,
            step_seconds=self.loop.step_seconds.to_proto(),
            adapter_load_seconds=self.adapter_load_seconds.to_proto(),
            num_device_bytes=total_bytes,
            num_device_bytes_free=free_bytes,
        )
        for totals in self.speculator.totals() if self.speculator else ():
            stats.drafts.add(**asdict(totals))
        stats.num_waiting += self.intake.num_preparing
        for name, num_bytes in self.memory.parts.items():
            stats.memory_parts.add(name=name, num_bytes=num_bytes)
        for entry in self.adapters.resident:
            adapter = common_pb2.AdapterRef(**asdict(entry.adapter))
            stats.resident_adapters.add(adapter=adapter, slot=entry.slot, num_pins=entry.num_pins)
        return stats
