"""The benchmark of routing, on a part of its trace: its aims hold, and its figures are counted right."""

import pytest

from benchmarks.routing.__main__ import LEAST_OF_ONE_ENGINES_HITS, MOST_IMBALANCE, imbalance, measure
from benchmarks.routing.trace import TraceShape


async def test_four_engines_keep_the_hit_rate_of_one_and_share_the_requests():
    # With fewer conversations chance alone takes one engine past the aim: a conversation's later turns
    # go where its first one went.
    shape = TraceShape(num_turns=3, start_tokens=256, answer_tokens=4)
    play = {"num_clients": 16, "think_s": 1.1, "seed": 1}
    one = await measure(1, 1, shape, **play)
    four = await measure(4, 2, shape, **play)
    assert one.num_prompt_tokens == four.num_prompt_tokens
    assert sum(four.requests) == 64 * 3 + 64
    # Second and third turns find their start again, and nothing else does.
    assert one.hit_rate == pytest.approx(0.5, abs=0.05)
    assert four.hit_rate >= LEAST_OF_ONE_ENGINES_HITS * one.hit_rate
    assert imbalance(four.requests) <= MOST_IMBALANCE
