"""`python -m kiln_engine.simulation`: the scheduler on a seeded workload, without a model."""

from __future__ import annotations

import argparse
from statistics import mean

from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.simulation.simulate import StepCosts, Summary, simulate
from kiln_engine.simulation.workload import WorkloadShape, make_workload


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kiln_engine.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--state-slots", type=int, default=48)
    parser.add_argument("--max-running", type=int, default=32)
    parser.add_argument("--step-token-budget", type=int, default=512)
    parser.add_argument("--run-ahead", type=int, choices=(0, 1), default=0)
    parser.add_argument("--check", action="store_true", help="check every invariant after each step")
    options = parser.parse_args()
    shape = WorkloadShape(num_requests=options.requests)
    limits = SchedulerLimits(
        num_pages=options.pages,
        num_state_slots=options.state_slots,
        max_model_len=1024,
        max_running=options.max_running,
        step_token_budget=options.step_token_budget,
    )
    summary = simulate(
        make_workload(shape, options.seed),
        limits,
        StepCosts(),
        vocab_size=shape.vocab_size,
        run_ahead=options.run_ahead,
        is_checking=options.check,
    )
    for name, value in table(summary):
        print(f"{name:<44}{value:>12}")


def table(summary: Summary) -> list[tuple[str, str]]:
    """Rows of the summary: what is counted, and how much."""
    stats = summary.stats
    prompt = max(stats.num_prompt_tokens, 1)
    return [
        ("requests ended", f"{summary.num_ended}"),
        ("steps", f"{stats.num_steps}"),
        ("simulated seconds", f"{summary.simulated_s:.2f}"),
        ("prompt tokens", f"{stats.num_prompt_tokens}"),
        ("generated tokens", f"{stats.num_generated_tokens}"),
        ("generated tokens a second", f"{stats.num_generated_tokens / summary.simulated_s:.0f}"),
        ("tokens a step, mean", f"{mean(summary.step_tokens):.1f}"),
        ("decode rows a step, mean", f"{mean(summary.decode_batch_sizes or [0]):.1f}"),
        ("decode rows a step, most", f"{max(summary.decode_batch_sizes or [0])}"),
        ("cache hit rate", f"{stats.num_cached_tokens / prompt:.1%}"),
        ("matched, lost for want of a checkpoint", f"{stats.num_tokens_lost_for_want_of_checkpoint}"),
        ("preemptions", f"{stats.num_preemptions}"),
        ("seconds in queue, mean", f"{mean(summary.queue_s or [0.0]):.3f}"),
        ("seconds in queue, most", f"{max(summary.queue_s or [0.0]):.3f}"),
        ("pages cached at the end", f"{stats.num_pages_cached} of {stats.num_pages}"),
        ("checkpoints at the end", f"{stats.num_state_slots_cached} of {stats.num_state_slots}"),
    ]


if __name__ == "__main__":
    main()
