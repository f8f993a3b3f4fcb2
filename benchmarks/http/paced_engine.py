"""An engine process without a model, whose steps take as long as they are told to.

    python -m benchmarks.http.paced_engine --listen unix:/tmp/e.sock --step-ms 4 --row-us 20

gRPC, mailbox, loop and scheduler are the ones that serve; only the runner is not. With it the cost of
everything around the model can be measured on any machine.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from kiln_common.ids import new_id
from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.stop_signals import wait_for_stop_signal
from kiln_engine.bootstrap import EngineParts, start_engine
from kiln_engine.domain import BatchPlan, RowResult, StepResult
from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.settings import EngineSettings


@dataclass(frozen=True)
class _PacedStep:
    result: StepResult
    end_s: float

    def draw(self) -> None:
        pass

    def wait(self) -> StepResult:
        time.sleep(max(0.0, self.end_s - time.perf_counter()))
        return self.result


class PacedRunner:
    """Draws made-up tokens; a step takes `step_s`, and more for each row and each prompt token."""

    def __init__(self, vocab_size: int, step_s: float, row_s: float, prompt_token_s: float) -> None:
        self._vocab_size = vocab_size
        self._step_s, self._row_s, self._prompt_token_s = step_s, row_s, prompt_token_s
        self._device_free_s = 0.0

    def launch(self, plan: BatchPlan) -> _PacedStep:
        rows = [(row.sequence_id, row.position) for row in plan.decode_rows]
        num_prompt_tokens = plan.num_tokens - len(rows)
        rows += [(c.sequence_id, c.start + len(c.token_ids)) for c in plan.prefill_chunks if c.sampling]
        results = tuple(
            RowResult(sequence_id, (sequence_id * 7919 + position * 31) % self._vocab_size, -1.0, -1.0)
            for sequence_id, position in rows
        )
        duration_s = self._step_s + self._row_s * len(rows) + self._prompt_token_s * num_prompt_tokens
        self._device_free_s = max(time.perf_counter(), self._device_free_s) + duration_s
        return _PacedStep(StepResult(plan.step_id, results), self._device_free_s)


class _NoAdapters:
    """There are none to bring."""

    def stage(self, slot: int, adapter_bytes: bytes, config_json: str) -> None:
        raise NotImplementedError

    def activate(self, slot: int) -> None:
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        raise NotImplementedError


class _NoWeights:
    socket_path = ""
    num_leases = 0
    num_bytes = 0

    def checksum(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing was opened."""


def make_parts(options: argparse.Namespace) -> EngineParts:
    limits = SchedulerLimits(
        num_pages=options.most_running * 160,
        num_state_slots=2 * options.most_running,
        max_model_len=8192,
        max_running=options.most_running,
        step_token_budget=8192,
    )
    base_model = common_pb2.BaseModel(
        model_id="paced",
        model_hash="0" * 64,
        vocab_size=options.vocab_size,
        max_model_len=limits.max_num_tokens,
        eos_token_ids=[0],
    )
    info = engine_pb2.EngineInfo(
        base_model=base_model, boot_id=new_id("boot"), device="cuda", page_tokens=16, num_adapter_slots=1
    )
    runner = PacedRunner(
        options.vocab_size, 1e-3 * options.step_ms, 1e-6 * options.row_us, 1e-6 * options.prompt_token_us
    )
    return EngineParts(runner, _NoAdapters(), _NoWeights(), limits, info)


async def serve(options: argparse.Namespace) -> None:
    settings = EngineSettings(
        model_path="none",
        listen=options.listen,
        socket_dir=Path("/nonexistent"),
        drain_timeout_s=0,
        run_ahead=1,
    )
    engine = await start_engine(settings, make_parts(options))
    await wait_for_stop_signal()
    await engine.stop()


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line says, or these arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--listen", required=True, help="gRPC address")
    parser.add_argument("--vocab-size", type=int, default=2560)
    parser.add_argument("--most-running", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=2.4, help="of every step")
    parser.add_argument("--row-us", type=float, default=25.0, help="more for each row")
    parser.add_argument("--prompt-token-us", type=float, default=10.0, help="more for each prompt token")
    return parser.parse_args(arguments)


def main() -> None:
    asyncio.run(serve(parse_options()))


if __name__ == "__main__":
    main()
