"""From the events of a load run to its figures."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.http.sse_client import Answer
from benchmarks.percentiles import percentile


@dataclass(frozen=True)
class Outcome:
    """One request, its events decoded. Times are seconds."""

    start_s: float
    end_s: float
    token_times_s: tuple[float, ...]
    num_output_tokens: int
    num_prompt_tokens: int
    error: str


def decode(answer: Answer) -> Outcome:
    """Token times and counts from the stored payloads.

    Output tokens are counted from the server's `usage`, and from the events where it sends none.
    """
    error = answer.error
    times: list[float] = []
    num_output = num_prompt = 0
    is_last_bare = False  # the last event only says why the request ended
    for when, payload in answer.events:
        event = _parsed(payload)
        if event is None:
            error = error or f"bad event: {payload[:100]!r}"
            continue
        if "error" in event:
            error = error or f"error event: {json.dumps(event['error'])[:200]}"
        usage = event.get("usage") or {}
        num_output = usage.get("completion_tokens") or num_output
        num_prompt = usage.get("prompt_tokens") or num_prompt
        # An event with a choice carries tokens, also where its text is empty (part of a character,
        # or a server that does not detokenize).
        choices = event.get("choices") or []
        if choices:
            times.append(when)
            is_last_bare = bool(choices[0].get("finish_reason")) and not choices[0].get("text")
    if not num_output:
        num_output = len(times) - is_last_bare
    elif is_last_bare and len(times) > num_output:
        times.pop()
    if not times:
        error = error or "no token received"
    return Outcome(answer.start_s, answer.end_s, tuple(times), num_output, num_prompt, error)


def _parsed(payload: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(payload)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def report(
    outcomes: Sequence[Outcome], *, prompt_tokens: int, max_tokens: int, cpu_s: float
) -> dict[str, Any]:
    """Every figure of a run, seconds unless a name says otherwise."""
    good = [outcome for outcome in outcomes if not outcome.error]
    wall_s = max(o.end_s for o in outcomes) - min(o.start_s for o in outcomes)
    num_tokens = sum(outcome.num_output_tokens for outcome in good)
    num_events = sum(len(outcome.token_times_s) for outcome in good)
    gaps = [after - before for o in good for before, after in itertools.pairwise(o.token_times_s)]
    per_token = [
        (o.token_times_s[-1] - o.token_times_s[0]) / (o.num_output_tokens - 1)
        for o in good
        if o.num_output_tokens > 1 and len(o.token_times_s) > 1
    ]
    return {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "short_outputs": sum(outcome.num_output_tokens < max_tokens for outcome in good),
        "wall_s": wall_s,
        "requests_per_s": len(good) / wall_s,
        "output_tokens": num_tokens,
        "output_tok_s": num_tokens / wall_s,
        "prompt_tok_s": sum(o.num_prompt_tokens or prompt_tokens for o in good) / wall_s,
        "tokens_per_event": num_tokens / num_events if num_events else None,
        "ttft_s": summary([o.token_times_s[0] - o.start_s for o in good]),
        "itl_s": summary(gaps),
        "tpot_s": summary(per_token),
        "latency_s": summary([o.end_s - o.start_s for o in good]),
        "client_cpu_share": cpu_s / wall_s,
    }


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, percentiles and the largest; None for all when there are no values."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    ordered = sorted(values)
    return {
        "mean": sum(values) / len(values),
        "p50": percentile(ordered, 0.5),
        "p90": percentile(ordered, 0.9),
        "p99": percentile(ordered, 0.99),
        "max": ordered[-1],
    }


def print_table(figures: dict[str, Any]) -> None:
    print(
        f"requests         {figures['completed']} completed, {figures['failed']} failed, "
        f"{figures['short_outputs']} shorter than asked"
    )
    print(f"wall time        {figures['wall_s']:.2f} s")
    print(
        f"throughput       {figures['output_tok_s']:.1f} output tok/s, "
        f"{figures['prompt_tok_s']:.1f} prompt tok/s, {figures['requests_per_s']:.2f} req/s"
    )
    columns = ("mean", "p50", "p90", "p99", "max")
    print(f"{'ms':<12}" + "".join(f"{column:>10}" for column in columns))
    for name, key in (("TTFT", "ttft_s"), ("ITL", "itl_s"), ("TPOT", "tpot_s"), ("latency", "latency_s")):
        print(f"{name:<12}" + "".join(f"{_ms(figures[key][column]):>10}" for column in columns))
    per_event = figures["tokens_per_event"]
    print(f"tokens/event     {'-' if per_event is None else format(per_event, '.2f')}")
    print(f"client CPU       {figures['client_cpu_share']:.2f} of one core")
    for text, count in figures["errors"].items():
        print(f"error x{count}: {text}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
