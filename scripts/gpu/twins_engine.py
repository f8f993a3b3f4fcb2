"""The engine's half of the correctness twins: runs requests and writes down what was drawn.

    python scripts/gpu/twins_engine.py --model FOLDER --out trace.json [--set kv_dtype=fp8] [--tiny]

Only requests go in and only events come out, through the production scheduler, loop and runner, so
whatever serves (graphs, kernels, sampler) is what is looked at.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.engine.recording import Recorder, Recording
from benchmarks.engine.requests import make_request, random_prompt
from benchmarks.engine.spine import Spine, UnknownSetting, make_settings
from kiln_common.logs import configure_logs
from kiln_engine.domain import GenerationRequest


@dataclass(frozen=True)
class TwinSizes:
    """How much is run."""

    num_scored: int = 48
    most_prompt_tokens: int = 700
    output_tokens: int = 160
    batch: int = 64
    num_alone: int = 12
    alone_tokens: int = 96
    long_tokens: int = 4096
    num_joining: int = 200
    prefix_tokens: int = 512


TINY = TwinSizes(
    num_scored=6,
    most_prompt_tokens=70,
    output_tokens=20,
    batch=6,
    num_alone=2,
    alone_tokens=16,
    long_tokens=120,
    num_joining=12,
    prefix_tokens=64,
)


@dataclass(frozen=True)
class Trace:
    """One request and what was drawn for it; `is_greedy` drew the most likely token each time."""

    group: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    is_greedy: bool
    num_cached_tokens: int = 0


@dataclass
class Report:
    """Everything one set of settings gave."""

    settings: str
    traces: list[Trace] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def traces_of(group: str, requests: list[GenerationRequest], recording: Recording) -> list[Trace]:
    """One trace for each request that drew a token."""
    events = recording.tokens_by_request()
    return [
        Trace(
            group,
            list(request.prompt_token_ids),
            [event.row.token_id for event in own if event.row],
            [event.row.logprob for event in own if event.row],
            request.sampling.temperature == 0,
            own[0].num_cached_tokens,
        )
        for request in requests
        if (own := events.get(request.request_id))
    ]


class Twin:
    """One engine, and the runs whose traces the reference scores."""

    def __init__(self, spine: Spine, sizes: TwinSizes, settings: str) -> None:
        self._spine = spine
        self._sizes = sizes
        self._vocab_size = spine.config.vocab_size
        self.report = Report(settings)

    def score_batch(self) -> None:
        """Prompts of many lengths at once, half of them greedy."""
        source = random.Random(1)
        requests = []
        for index in range(self._sizes.num_scored):
            length = source.randint(1, self._sizes.most_prompt_tokens)
            prompt = random_prompt(length, self._vocab_size, ("scored", index))
            temperature = float(index % 2)
            requests.append(
                make_request(prompt, self._sizes.output_tokens, seed=index, temperature=temperature)
            )
        self.report.traces += traces_of("batch", requests, self._spine.run(requests))

    def compare_alone(self) -> None:
        """Seeded requests in a batch, and some of them again alone."""
        sizes = self._sizes
        prompts = [
            random_prompt(40 + 3 * row, self._vocab_size, ("alone", row)) for row in range(sizes.batch)
        ]

        def request(row: int, salt: str) -> GenerationRequest:
            return make_request(prompts[row], sizes.alone_tokens, seed=row, salt=salt)

        together = [request(row, "together") for row in range(sizes.batch)]
        drawn = [trace.tokens for trace in traces_of("", together, self._spine.run(together))]
        firsts = []
        for row in range(sizes.num_alone):
            alone = [request(row, "alone")]
            tokens = traces_of("", alone, self._spine.run(alone))[0].tokens
            firsts.append(_first_difference(tokens, drawn[row]))
        self.report.facts["alone_identical_share"] = firsts.count(None) / len(firsts)
        self.report.facts["alone_first_differences"] = firsts
        self.report.facts["is_batch_invariant"] = self._spine.settings.batch_invariant

    def run_long(self) -> None:
        """One long answer while many sequences join and leave, some of them cut off; then all is free."""
        sizes, spine = self._sizes, self._spine
        source = random.Random(2)
        long = make_request(random_prompt(100, self._vocab_size, "long"), sizes.long_tokens, seed=1)
        long_recorder = Recorder(1)
        spine.loop.submit(long, (), long_recorder)
        shared = random_prompt(sizes.prefix_tokens, self._vocab_size, "joining")
        joining = []
        for index in range(sizes.num_joining):
            own = random_prompt(source.randint(1, 200), self._vocab_size, ("joining", index))
            prompt = shared[: source.choice((0, 0, len(shared) // 2, len(shared)))] + own
            joining.append(make_request(prompt, source.randint(1, sizes.output_tokens), seed=index))
        for index in range(sizes.num_joining // 10):  # nobody waits for these
            cut = make_request(random_prompt(30, self._vocab_size, ("cut", index)), 10_000, seed=index)
            spine.loop.submit(cut, (), Recorder(1))
            joining.append(make_request(random_prompt(20, self._vocab_size, ("late", index)), 8, seed=index))
            spine.loop.run_between_steps(lambda request_id=cut.request_id: spine.loop.abort(request_id))
        joined = spine.run_clients(joining, num_clients=24)
        long_recording = long_recorder.wait(600.0)
        after = spine.stats
        traces = traces_of("joining", joining, joined)
        long_traces = traces_of("long", [long], long_recording)
        self.report.traces += traces[:: max(1, len(traces) // 16)] + long_traces
        logprobs = [value for trace in traces + long_traces for value in trace.logprobs]
        self.report.facts |= {
            "leaked_pages": after.num_pages_in_use - after.num_pages_cached,
            "leaked_state_slots": after.num_state_slots_in_use - after.num_state_slots_cached,
            "num_running_after": after.num_running + after.num_waiting,
            "num_not_finite": sum(not math.isfinite(value) for value in logprobs),
            "num_sequences": len(joining) + sizes.num_joining // 10 + 1,
        }

    def spoil_checkpoints(self) -> None:
        """Answers that start from a cached checkpoint: as it is, wiped, and swapped with another's."""
        for name, spoil in (("intact", None), ("wiped", self._wipe), ("swapped", self._swap)):
            length = self._sizes.prefix_tokens
            prefixes = [random_prompt(length, self._vocab_size, (name, number)) for number in range(2)]
            for prefix in prefixes:
                own = random_prompt(9, self._vocab_size, (name, "first"))
                self._spine.run([make_request(prefix + own, 1)])
            if spoil is not None:
                self._spine.between_steps(spoil)
            requests = [
                make_request(prefix + random_prompt(9, self._vocab_size, (name, "second")), 32, seed=3)
                for prefix in prefixes
            ]
            self.report.traces += traces_of(name, requests, self._spine.run(requests))

    @torch.inference_mode()
    def _wipe(self) -> None:
        for index in range(self._spine.config.num_linear_layers):
            self._spine.runner.states.layer(index).state_SHKV.zero_()

    @torch.inference_mode()
    def _swap(self) -> None:
        """Give every cached checkpoint the state of the next one."""
        states = self._spine.scheduler.memory.states
        slots = [slot for slot in range(states.num_ids) if states.is_only_cached(slot)]
        assert len(slots) > 1, slots
        for index in range(self._spine.config.num_linear_layers):
            state_SHKV = self._spine.runner.states.layer(index).state_SHKV
            state_SHKV[slots] = state_SHKV[slots[1:] + slots[:1]]


def _first_difference(left: list[int], right: list[int]) -> int | None:
    """Index of the first token that differs; None where there is none."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EngineSettings")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    parser.add_argument("--short", action="store_true", help="without spoilt checkpoints and the long answer")
    options = parser.parse_args()
    overrides = dict(pair.split("=", 1) for pair in options.set)
    sizes = TINY if options.tiny else TwinSizes()
    try:
        settings = make_settings(options.model, **{"max_running": sizes.batch, **overrides})
    except UnknownSetting as error:
        print(f"skipped: this engine has no setting {error}")
        return
    configure_logs("twins", as_json=True)
    with Spine(settings) as spine:
        twin = Twin(spine, sizes, spine.label(overrides))
        twin.score_batch()
        twin.compare_alone()
        if not options.short:
            twin.spoil_checkpoints()
            twin.run_long()
    options.out.write_text(json.dumps(asdict(twin.report)))


if __name__ == "__main__":
    main()
