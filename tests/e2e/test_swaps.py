"""Versions that each say their own token, swapped under load in a whole stack: none is ever mixed up."""

import asyncio
import statistics
from pathlib import Path

import pytest

from benchmarks.swap.grpo import time_job
from benchmarks.swap.rollbacks import run_rollbacks
from benchmarks.swap.swaps import StackAddresses, run_swaps
from benchmarks.swap.telling_adapters import TellingAdapters
from tests.support.variants import patience

pytestmark = pytest.mark.processes

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
NUM_SWAPS = 100 // patience()


def test_every_token_of_many_swaps_is_of_the_version_its_answer_names(stack):
    adapters = TellingAdapters(DEMO_MODEL, rank=4, covers_all=False)
    addresses = StackAddresses.of(stack.url, stack.state_dir)
    report = asyncio.run(run_swaps(addresses, adapters, num_swaps=NUM_SWAPS, num_clients=4, max_tokens=24))
    log = (stack.state_dir / "logs" / "engine.log").read_text()
    answers = report.answers
    assert (answers.failures, answers.wrong) == ([], [])
    # Enough of them: answers that stayed with one version, and answers of several.
    assert answers.num_requests > answers.num_mixed > 0
    assert len(answers.by_version) > NUM_SWAPS // 2
    assert len(report.swap_s) == NUM_SWAPS
    # Their slots were filled ahead of them, but for a few of these small files that their own event overtook.
    residents = [line for line in log.splitlines() if "adapter_resident" in line and "teller@" in line]
    assert len([line for line in residents if '"came_from": "trainer"' in line]) > NUM_SWAPS // 2
    assert "adapter_not_taken" not in log


def test_a_rollback_under_traffic_answers_at_once_with_the_older_version_and_fails_nobody(stack):
    adapters = TellingAdapters(DEMO_MODEL, rank=4, covers_all=False)
    addresses = StackAddresses.of(stack.url, stack.state_dir)
    report = asyncio.run(run_rollbacks(addresses, adapters, num_rollbacks=10, num_clients=4, max_tokens=24))
    answers = report.answers
    assert (answers.failures, answers.wrong) == ([], [])
    assert answers.num_requests > answers.num_mixed > 0  # also answers that changed versions on their way
    # A first token waits for steps, which take what they take; going back takes the call and nothing else.
    # Medians: a single call may wait for whatever else a machine does.
    assert statistics.median(report.call_s) < 1.0, report.call_s
    assert statistics.median(report.first_token_s) < statistics.median(report.ordinary_s) + 0.5, report


def test_a_job_is_timed_from_its_post_to_its_versions_first_token(stack):
    seconds = asyncio.run(time_job(stack.url, "timed", num_rollouts=2, max_tokens=8))
    milestones = ["claimed", "started", "step", "publishing", "published", "first token"]
    assert [seconds[name] for name in milestones] == sorted(seconds[name] for name in milestones)
    assert 0 < seconds["claimed"] < seconds["first token"] < 60
