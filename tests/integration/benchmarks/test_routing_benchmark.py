"""The benchmark of routing, on a part of its trace: its aims hold, and its figures are counted right."""

import pytest

from benchmarks.routing.__main__ import LEAST_OF_ONE_ENGINES_HITS, MOST_IMBALANCE, imbalance, measure
from benchmarks.routing.trace import TraceShape


async def test_four_engines_keep_the_hit_rate_of_one_and_share_the_requests():
    shape = TraceShape(num_conversations=16, num_turns=3, num_single=16, start_tokens=256, answer_tokens=4)
    play = {"num_clients": 8, "think_s": 1.1, "seed": 1}
    one = await measure(1, 1, shape, **play)
    four = await measure(4, 2, shape, **play)
    assert one.num_prompt_tokens == four.num_prompt_tokens
    assert sum(four.requests) == 16 * 3 + 16
    # Second and third turns find their start again, and nothing else does.
    assert one.hit_rate == pytest.approx(0.5, abs=0.05)
    assert four.hit_rate >= LEAST_OF_ONE_ENGINES_HITS * one.hit_rate
    assert imbalance(four.requests) <= MOST_IMBALANCE
