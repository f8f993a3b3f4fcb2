"""Random lives of jobs on a real Redis, checked against a model of what must hold.

Trainers claim, fall silent, come back late, write, release and end jobs; clients submit and cancel.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kiln_common.bus import keys
from kiln_common.bus.connect import connect
from kiln_trainer.domain.errors import ClaimLost
from kiln_trainer.jobs.records import FINAL_STATUSES, JobFailure
from kiln_trainer.jobs.store import JobStore
from tests.support.jobs import grpo_request
from tests.support.redis_server import private_redis

ADAPTERS = st.sampled_from(["a", "b"])
TRAINERS = st.integers(0, 2)


class JobLives(RuleBasedStateMachine):
    """`claims` holds every claim ever given, newest last for each job."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.redis = connect(self.url)
        self.redis.flushall()
        self.stores = [JobStore(self.redis, f"trainer_{n}", retention_s=60) for n in range(3)]
        self.adapter_of: dict[str, str] = {}
        self.claims: dict[str, list] = {}
        self.final: dict[str, str] = {}

    def teardown(self) -> None:
        """Whatever happened, every job that is open can still be brought to its end, in order."""
        while set(self.adapter_of) - set(self.final):
            claim = self.stores[0].claim_next(0.0, 0.0)
            assert claim is not None, "an open job can no longer be claimed"
            self._note(claim)
            self.stores[0].succeed(claim, {})
            self.final[claim.job_id] = "succeeded"
        assert not self.redis.exists(keys.JOB_RUNNING)
        assert not [*self.redis.scan_iter(keys.owner_queue("*", "*"))]
        assert self.stores[0].num_queued() == 0
        self.redis.close()

    @rule(adapter=ADAPTERS, owner=st.sampled_from(["", "key"]), priority=st.integers(-1, 1))
    def submit(self, adapter: str, owner: str, priority: int) -> None:
        request = grpo_request(adapter, priority=priority)
        request.owner = owner
        # Ids of their own, so that a failing life can be lived again.
        job_id = self.stores[0].submit(request, f"job_{len(self.adapter_of):03}")
        self.adapter_of[job_id] = adapter

    @rule(trainer=TRAINERS, is_takeover=st.booleans())
    def claim(self, trainer: int, is_takeover: bool) -> None:
        claim = self.stores[trainer].claim_next(0.0 if is_takeover else 3600.0, 0.0)
        if claim is not None:
            self._note(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), trainer=TRAINERS, how=st.sampled_from(["write", "beat", "release", "ok", "fail"]))
    def act_on_a_claim(self, data: st.DataObject, trainer: int, how: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.claims)))
        claim = data.draw(st.sampled_from(self.claims[job_id]))
        is_current = claim is self.claims[job_id][-1] and job_id not in self.final
        store = self.stores[trainer]
        if how == "release":
            store.release(claim)
            return
        act = {
            "write": lambda: store.write(claim, claim.claim_epoch, {"metrics": "{}"}, []),
            "beat": lambda: store.heartbeat(claim),
            "ok": lambda: store.succeed(claim, {}),
            "fail": lambda: store.fail(claim, JobFailure("c", "m", "h")),
        }[how]
        status = {"ok": "succeeded", "fail": "failed"}.get(how)
        is_repeat = self.final.get(job_id) == status and claim is self.claims[job_id][-1]
        expectation = contextlib.nullcontext() if is_current or is_repeat else pytest.raises(ClaimLost)
        with expectation:
            act()
        if is_current and status:
            self.final[job_id] = status

    @precondition(lambda self: self.adapter_of)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.adapter_of)))
        self.stores[0].cancel(job_id)
        if job_id not in self.claims:
            self.final.setdefault(job_id, "cancelled")

    @invariant()
    def statuses_agree_and_one_job_of_an_adapter_runs(self) -> None:
        running: list[str] = []
        for job_id, adapter in self.adapter_of.items():
            status = self.stores[0].status(job_id)
            if job_id in self.final:
                assert status == self.final[job_id]
            else:
                assert status == ("running" if job_id in self.claims else "queued")
                assert status not in FINAL_STATUSES
            if status == "running":
                running.append(adapter)
        assert len(running) == len(set(running))

    def _note(self, claim) -> None:
        adapter = self.adapter_of[claim.job_id]
        earlier = [j for j in self.adapter_of if self.adapter_of[j] == adapter]
        for job_id in earlier[: earlier.index(claim.job_id)]:
            assert job_id in self.final, "a job ran before an earlier one of its adapter ended"
        assert claim.job_id not in self.final
        known = self.claims.setdefault(claim.job_id, [])
        assert claim.claim_epoch == len(known) + 1
        known.append(claim)


def test_jobs_end_once_in_order_and_under_one_claim():
    # A folder of its own: hypothesis and function-scoped fixtures do not mix.
    with tempfile.TemporaryDirectory() as folder, private_redis(Path(folder)) as server:
        JobLives.url = server.url
        run_state_machine_as_test(
            JobLives,
            settings=settings(
                max_examples=40,
                stateful_step_count=25,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
