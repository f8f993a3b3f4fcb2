"""Times the demo model's answers with and without speculation, and says how many drafts were accepted.

    python -m benchmarks.speculation [--kinds none ngram mtp] [--batches 1 4 16] [--drafts 1 2 3]

The requests are held-out conversations of the model's own kind, a closed loop of as many clients as the
batch. The engine is the one that serves, without its wire; `--device cuda` runs it on a GPU. Every kind
must give the same answers; where floating-point sums of the passes differ, an answer may part from
the others at a draw that lies on an edge, and the share of equal answers is printed.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer

from benchmarks.engine.spine import AdapterSlots, Spine, make_settings
from demo.data import conversations
from demo.data.rendering import render_prompt
from kiln_engine.domain import AdapterUse, GenerationRequest, SamplingParams
from tests.support.demo_serving import DEMO_MODEL

_MAX_TOKENS = 120
_HELD_OUT_SEED = 71


@dataclass(frozen=True)
class Run:
    """One kind of speculation, serving one batch size at one temperature."""

    tokens_per_s: float
    tokens_per_step_and_row: float
    num_proposed: int
    num_accepted: int
    answers: list[list[int]]

    @property
    def acceptance(self) -> float:
        return self.num_accepted / self.num_proposed if self.num_proposed else 0.0


def make_requests(count: int, temperature: float, salt: str) -> list[GenerationRequest]:
    """Conversations up to the answer; nothing of one run is cached for the next."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    rng = random.Random(_HELD_OUT_SEED)
    requests = []
    for number in range(count):
        drawn = conversations.draw(rng)
        prompt = render_prompt(drawn.messages, drawn.tools, thinking=drawn.thinking)
        sampling = SamplingParams(max_tokens=_MAX_TOKENS, temperature=temperature, seed=number)
        ids = tuple(tokenizer.encode(prompt).ids)
        requests.append(GenerationRequest(f"{salt}-{number}", ids, sampling, cache_salt=salt))
    return requests


def measure(
    spine: Spine,
    batch: int,
    count: int,
    temperature: float,
    salt: str,
    *,
    adapters: tuple[AdapterUse, ...] = (),
    slots: AdapterSlots = (),
) -> Run:
    """Serve `count` requests, `batch` of them at any time, after as many to warm up, with these adapters."""

    def requests_of(number: int, salt: str) -> list[GenerationRequest]:
        return [replace(each, adapters=adapters) for each in make_requests(number, temperature, salt)]

    warm_up = requests_of(2 * batch, f"warm-{salt}")
    spine.run_clients(warm_up, batch, may_stop=True, adapter_slots=slots)
    before, drafts_before = spine.stats, _totals(spine)
    requests = requests_of(count, salt)
    # On a CPU its own time, so that whoever else uses the machine matters less.
    clock = time.process_time if spine.parts.info.device == "cpu" else time.perf_counter
    started_s = clock()
    recording = spine.run_clients(requests, batch, may_stop=True, adapter_slots=slots)
    seconds = clock() - started_s
    after, drafts_after = spine.stats, _totals(spine)
    drawn = recording.tokens_by_request()
    num_tokens = after.num_generated_tokens - before.num_generated_tokens
    num_steps = after.num_steps - before.num_steps
    return Run(
        num_tokens / seconds,
        num_tokens / num_steps / batch,
        drafts_after[0] - drafts_before[0],
        drafts_after[1] - drafts_before[1],
        [[event.row.token_id for event in drawn[request.request_id] if event.row] for request in requests],
    )


def _totals(spine: Spine) -> tuple[int, int]:
    totals = spine.speculator.totals() if spine.speculator else ()
    return sum(each.num_proposed for each in totals), sum(each.num_accepted for each in totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["none", "ngram", "mtp"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--drafts", type=int, nargs="+", default=[3], help="most tokens drafted")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--fixed", action="store_true", help="always draft as far as allowed")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'kind':>6} {'drafts':>6} {'temp':>5} {'batch':>5} {'tok/s':>8} {'ratio':>6} {'tok/step':>8}",
        end="",
    )
    print(f" {'accepted':>9} {'of':>7} {'share':>6} {'same':>5}")
    plain: dict[tuple[float, int], Run] = {}
    for kind in options.kinds:
        for drafts in options.drafts if kind != "none" else options.drafts[:1]:
            spine = Spine(
                make_settings(
                    DEMO_MODEL,
                    device=options.device,
                    max_model_len=2048,
                    max_running=max(options.batches),
                    speculation=kind,
                    max_draft_tokens=drafts,
                    adaptive_drafts=not options.fixed,
                )
            )
            for temperature in options.temperatures:
                for batch in options.batches:
                    run = measure(spine, batch, options.requests, temperature, f"{temperature}-{batch}")
                    base = plain.setdefault((temperature, batch), run)
                    same = sum(map(list.__eq__, run.answers, base.answers)) / len(run.answers)
                    print(
                        f"{kind:>6} {drafts if kind != 'none' else 0:>6} {temperature:>5} {batch:>5}"
                        f" {run.tokens_per_s:>8.0f} {run.tokens_per_s / base.tokens_per_s:>6.2f}"
                        f" {run.tokens_per_step_and_row:>8.2f} {run.num_accepted:>9} {run.num_proposed:>7}"
                        f" {run.acceptance:>6.3f} {same:>5.2f}",
                        flush=True,
                    )
            spine.close()


if __name__ == "__main__":
    main()
