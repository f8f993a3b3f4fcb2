"""One engine as a gateway sees it: what it says, what was sent there, and whether it answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kiln_common.bus.engine_presence import LEASE_S, EngineWord
from kiln_common.pb import engine_pb2
from kiln_common.service_names import service_name
from kiln_gateway.ports import EnginePort
from kiln_gateway.routing import EngineView, PlacementCount

# Beginnings that were sent to an engine and that it has not spoken of yet.
_MOST_REMEMBERED = 4096
_REMEMBER_S = 30.0


@dataclass(eq=False)
class EngineSeat:
    """Only the pool changes it. `is_configured`: it is kept however long the engine is away."""

    number: int
    client: EnginePort
    is_configured: bool = True
    info: engine_pb2.EngineInfo | None = None
    is_answering: bool = False
    silent_since_s: float | None = None
    num_in_flight: int = 0
    is_draining: bool = False
    word: EngineWord | None = None
    _word_at_s: float = 0.0
    _num_of_others: int = 0
    _placed: PlacementCount = field(default_factory=PlacementCount)
    _sent: OrderedDict[bytes, float] = field(default_factory=OrderedDict)

    @property
    def name(self) -> str:
        """Of configured engines in the order of their addresses, as `kiln up` names them; others follow."""
        return service_name("engine", self.number)

    @property
    def address(self) -> str:
        return self.client.address

    @property
    def model_hash(self) -> str:
        return self.info.base_model.model_hash if self.info is not None else ""

    @property
    def boot_id(self) -> str:
        """Of the engine that answered here last; empty before any has."""
        return self.info.boot_id if self.info is not None else ""

    def is_spoken_of(self, word: EngineWord) -> bool:
        return word.address == self.address or self.is_of_this_boot(word)

    def is_of_this_boot(self, word: EngineWord) -> bool:
        """Also under another address than the one this gateway was given."""
        return self.info is not None and word.boot_id == self.info.boot_id

    def is_given_up(self, now_s: float, patience_s: float) -> bool:
        """Whether requests still wait for an engine that has not answered for so long."""
        silent_s = now_s - self.silent_since_s if self.silent_since_s is not None else 0.0
        return self.num_in_flight > 0 and silent_s > patience_s

    def answered(self, info: engine_pb2.EngineInfo) -> bool:
        """Take in who answers here; returns whether it is another boot than before."""
        is_new = self.info is None or self.info.boot_id != info.boot_id
        if is_new:
            self._sent.clear()
            self.is_draining = False
        self.info, self.is_answering, self.silent_since_s = info, True, None
        return is_new

    def fell_silent(self, now_s: float) -> None:
        self.is_answering = False
        if self.silent_since_s is None:
            self.silent_since_s = now_s

    def hear(self, word: EngineWord, now_s: float) -> None:
        """Take in what the engine says of itself. What others sent there is what this gateway did not."""
        self.word, self._word_at_s = word, now_s
        self._num_of_others = max(0, word.num_running + word.num_waiting - self.num_in_flight)
        self.is_draining = word.is_draining
        for name in [name for name, at_s in self._sent.items() if now_s - at_s > _REMEMBER_S]:
            del self._sent[name]

    def place(self, path: Iterable[bytes], now_s: float) -> None:
        """A request goes there, and its beginnings will be in that engine's cache."""
        self._placed.add(now_s)
        for name in path:
            self._sent[name] = now_s
            self._sent.move_to_end(name)
        while len(self._sent) > _MOST_REMEMBERED:
            self._sent.popitem(last=False)

    def view(self, adapter_hashes: Iterable[str], now_s: float) -> EngineView:
        is_fresh = self.word is not None and now_s - self._word_at_s < LEASE_S
        resident = self.word.adapters if self.word is not None else frozenset()
        return EngineView(
            engine_id=self.address,
            num_running=self.num_in_flight + (self._num_of_others if is_fresh else 0),
            num_placed=self._placed.value(now_s),
            prefixes=self,
            has_adapters=resident.issuperset(adapter_hashes),
        )

    def __contains__(self, name: object) -> bool:
        """Whether it holds that beginning, as far as is known."""
        return name in self._sent or (self.word is not None and name in self.word.prefixes)
