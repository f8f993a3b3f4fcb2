"""A whole engine process in this one, on a runner without a model: gRPC, loop and scheduler are real."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from kiln_common.clients.engine import EngineClient
from kiln_common.pb import common_pb2, engine_pb2
from kiln_engine.bootstrap import EngineParts, RunningEngine, start_engine
from kiln_engine.domain import BatchPlan, StepResult
from kiln_engine.domain.ports import PendingStep
from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.settings import EngineSettings
from kiln_engine.simulation.runner import SimulatedRunner
from tests.support.variants import draft_memory

VOCAB_SIZE = 100
EOS = 7


class StubbornRunner:
    """A SimulatedRunner that can be held before a step, or told to fail the next ones.

    A step fails when it is waited for, as on a device, or with `fails_at_launch` before that.
    """

    def __init__(self, page_tokens: int = 16) -> None:
        self._inner = SimulatedRunner(vocab_size=VOCAB_SIZE, page_tokens=page_tokens)
        self._changed = threading.Condition()
        # How many steps may run in all; None is any number.
        self._num_allowed: int | None = None
        self._is_held = False
        self.num_failures_left = 0
        self.fails_at_launch = False
        self.plans: list[BatchPlan] = []

    def hold(self) -> None:
        self.hold_after(0)

    def hold_after(self, num_steps: int) -> None:
        """Run so many more steps, then wait."""
        with self._changed:
            self._num_allowed = len(self.plans) + num_steps

    def let_go(self) -> None:
        with self._changed:
            self._num_allowed = None
            self._changed.notify_all()

    def wait_until_held(self, timeout_s: float) -> bool:
        """Wait for a step that is not allowed to run yet; False when none came."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_held, timeout_s)

    def launch(self, plan: BatchPlan) -> PendingStep:
        with self._changed:
            self._is_held = self._num_allowed is not None and len(self.plans) >= self._num_allowed
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._num_allowed is None or len(self.plans) < self._num_allowed, 30
            )
            self._is_held = False
            self.plans.append(plan)
        if self.num_failures_left:
            self.num_failures_left -= 1
            if self.fails_at_launch:
                raise RuntimeError("the device is on fire")
            return BurningStep()
        return self._inner.launch(plan)


class BurningStep:
    def draw(self) -> None:
        pass

    def wait(self) -> StepResult:
        raise RuntimeError("the device is on fire")


class RecordingStore:
    """An adapter store that only keeps the order of what happened to its slots."""

    def __init__(self) -> None:
        self.history: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()
        self._active: set[int] = set()

    def stage(self, slot: int, adapter_bytes: bytes, config_json: str) -> None:
        assert slot not in self._active, "as the real store has it"
        self.history.append(("stage", slot, adapter_bytes))

    def activate(self, slot: int) -> None:
        self._active.add(slot)
        self.threads.add(threading.current_thread().name)
        self.history.append(("activate", slot))

    def clear(self, slot: int) -> None:
        self._active.discard(slot)
        self.threads.add(threading.current_thread().name)
        self.history.append(("clear", slot))


class FakeWeights:
    socket_path = "/nowhere/weights.sock"
    num_leases = 0
    num_bytes = 12

    def checksum(self) -> str:
        return "cd" * 32

    def close(self) -> None:
        pass


def make_parts(runner: Any, store: Any = None, *, num_adapter_slots: int = 2, **limits: int) -> EngineParts:
    """Device parts around a runner; `limits` override SchedulerLimits."""
    numbers = {
        "max_draft_tokens": draft_memory().get("max_draft_tokens", 0),
        "num_pages": 64,
        "num_state_slots": 16,
        "max_model_len": 256,
        "max_running": 8,
        "step_token_budget": 64,
        **limits,
    }
    info = engine_pb2.EngineInfo(
        base_model=common_pb2.BaseModel(
            model_id="tiny", model_hash="ab" * 32, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS]
        ),
        boot_id="boot",
        device="cpu",
        num_adapter_slots=num_adapter_slots,
    )
    return EngineParts(runner, store or RecordingStore(), FakeWeights(), SchedulerLimits(**numbers), info)


@contextlib.asynccontextmanager
async def running_engine(
    parts: EngineParts, folder: Path, **settings: Any
) -> AsyncIterator[tuple[RunningEngine, EngineClient]]:
    """The engine on a socket in `folder`, and a client of it."""
    fields = {
        "model_path": "unused",
        "listen": f"unix:{folder}/engine.sock",
        "drain_timeout_s": 0.2,
        **settings,
    }
    engine = await start_engine(EngineSettings(**fields), parts)
    client = EngineClient(fields["listen"])
    try:
        yield engine, client
    finally:
        if isinstance(parts.runner, StubbornRunner):
            parts.runner.let_go()
        await client.close()
        await engine.stop()


def generate_request(request_id: str = "r", prompt: Any = range(10, 30), **fields: Any) -> Any:
    """A GenerateRequest with neutral sampling; fields of SamplingParams are told apart by name."""
    sampling_names = engine_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    sampling = {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    sampling |= {"ignore_eos": True, "seed": 1}
    sampling |= {name: value for name, value in fields.items() if name in sampling_names}
    rest = {name: value for name, value in fields.items() if name not in sampling_names}
    return engine_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=engine_pb2.SamplingParams(**sampling),
        **rest,
    )


async def collect(client: EngineClient, request: Any) -> list[engine_pb2.SequenceOutput]:
    """Every output of a request."""
    return [output async for output in client.generate(request)]
