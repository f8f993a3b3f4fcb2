"""Random requests, aborts and steps on tiny pools: the books balance and every answer is right."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kiln_common.errors import KilnError, PromptTooLong
from kiln_engine.domain import AdapterUse, FinishReason
from kiln_engine.domain.adapter import AdapterChange, AdapterVersion
from kiln_engine.scheduling import check_invariants
from tests.support.engine_scheduling import (
    Guesser,
    SchedulerRig,
    expected_completion,
    make_request,
    right_guesses,
)

ADAPTERS = {
    "base": ((), ()),
    "x": ((AdapterUse("x"),), ((1, 1.0),)),
    "x and y": ((AdapterUse("x"), AdapterUse("y", 0.5)), ((1, 1.0), (2, 0.5))),
}
# Prompts are made of a few blocks, so that they share prefixes of every length.
BLOCKS = [tuple(range(10, 10 + length)) for length in (3, 4, 8, 13)]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(6, 20),
        num_state_slots=st.integers(2, 8),
        max_running=st.integers(1, 6),
        spare_budget=st.integers(4, 40),
        interval=st.sampled_from([4, 8, 64]),
        run_ahead=st.integers(0, 1),
        fixed_chunk_tokens=st.sampled_from([0, 0, 4, 8]),
        drafts=st.sampled_from(["none", "host", "device"]),
        max_draft_tokens=st.integers(1, 3),
        guess_period=st.sampled_from([0, 1, 3]),
    )
    def start(
        self,
        num_pages,
        num_state_slots,
        max_running,
        spare_budget,
        interval,
        run_ahead,
        fixed_chunk_tokens,
        drafts,
        max_draft_tokens,
        guess_period,
    ):
        speculator = None
        if drafts != "none" and not fixed_chunk_tokens:
            speculator = Guesser(
                right_guesses(lambda: self.rig, guess_period),
                max_draft_tokens=max_draft_tokens,
                on_device=drafts == "device",
                wants=self._wants,
            )
        self.rig = SchedulerRig(
            speculator=speculator,
            run_ahead=run_ahead,
            num_pages=num_pages,
            num_state_slots=num_state_slots,
            max_running=max_running,
            step_token_budget=max_running + max(spare_budget, fixed_chunk_tokens),
            max_model_len=64,
            checkpoint_interval_tokens=interval,
            fixed_chunk_tokens=fixed_chunk_tokens,
        )
        self.requests = {}
        self.aborted = set()
        self.moved = set()
        self.now = 0.0

    def _wants(self, candidate):
        """All that is allowed, or less, or nothing, by phases of the run."""
        phase = (int(self.now) // 4 + candidate.sequence_id) % 4
        return candidate.most_drafts if phase > 1 else phase

    @rule(
        blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3),
        tail=st.integers(0, 2),
        max_tokens=st.integers(1, 25),
        stable=st.integers(0, 24),
        shared=st.integers(0, 24),
        adapter=st.sampled_from(sorted(ADAPTERS)),
        salt=st.sampled_from(["", "s"]),
        priority=st.integers(-1, 1),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
        penalty=st.sampled_from([0.0, 0.0, 0.5]),
        patience=st.sampled_from([None, 5.0, 40.0]),
    )
    def add(
        self,
        blocks,
        tail,
        max_tokens,
        stable,
        shared,
        adapter,
        salt,
        priority,
        seed,
        ignore_eos,
        penalty,
        patience,
    ):
        prompt = [token for block in blocks for token in block] + [tail]
        adapters, slots = ADAPTERS[adapter]
        request = make_request(
            f"r{len(self.requests)}",
            prompt,
            max_tokens=max_tokens,
            adapters=adapters,
            num_stable_prefix_tokens=min(stable, len(prompt)),
            num_shared_prefix_tokens=min(shared, len(prompt)),
            cache_salt=salt,
            priority=priority,
            seed=seed,
            ignore_eos=ignore_eos,
            presence_penalty=penalty,
            arrival_s=self.now,
            deadline_s=None if patience is None else self.now + patience,
        )
        if len(prompt) >= self.rig.scheduler.limits.max_num_tokens:
            with pytest.raises(PromptTooLong):
                self.rig.add(request, slots)
            return
        self.rig.add(request, slots)
        self.requests[request.request_id] = (request, slots)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.now += 1.0
            must_plan = self.rig.scheduler.has_work and not self.rig.launched
            plan = self.rig.step(self.now)
            # What expired may have been all the work there was.
            assert not plan.is_empty or not must_plan or not self.rig.scheduler.has_work
            self._check_plan(plan)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        event = self.rig.scheduler.abort(request_id)
        if event is not None:
            self.rig.record([event])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort_between_plan_and_commit(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self._check_plan(self.rig.launch(self.now))
        event = self.rig.scheduler.abort(request_id)
        check_invariants(self.rig.scheduler)
        self.rig.record([event] if event else [])
        self.rig.settle(data.draw(st.integers(0, self.rig.run_ahead)))

    @rule()
    def fail_the_steps_under_way(self):
        self.rig.launch(self.now)
        self.rig.fail(KilnError("broken"))

    @rule()
    def settle(self):
        self.rig.settle()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), adapter=st.sampled_from(sorted(ADAPTERS)))
    def move(self, data, adapter):
        """As the loop does it: while no step runs."""
        self.rig.settle()
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        uses, slots = ADAPTERS[adapter]
        versions = tuple(AdapterVersion("n", 1, use.sha256) for use in uses)
        if self.rig.scheduler.move(request_id, AdapterChange(versions, uses, slots)):
            self.moved.add(request_id)

    @rule(sha256=st.sampled_from(["x", "y"]))
    def retire(self, sha256):
        self.rig.scheduler.retire_adapter(sha256)

    @invariant()
    def books_balance(self):
        if hasattr(self, "rig"):
            check_invariants(self.rig.scheduler)

    def _check_plan(self, plan):
        assert len(self.rig.launched) <= self.rig.run_ahead + 1
        limits = self.rig.scheduler.limits
        assert plan.num_tokens <= limits.step_token_budget
        ids = plan.sequence_ids
        assert len(ids) == len(set(ids)) <= limits.num_most_running
        unit = limits.fixed_chunk_tokens
        for chunk in plan.prefill_chunks if unit else ():
            assert chunk.start % unit == 0
            assert len(chunk.token_ids) == unit or (chunk.sampling and len(chunk.token_ids) < unit)

    def teardown(self):
        if not hasattr(self, "rig"):
            return
        while self.rig.scheduler.has_work:
            self.step(1)
        self.rig.settle()
        for request_id, (request, slots) in self.requests.items():
            events = self.rig.events[request_id]
            reasons = [event.finish_reason for event in events]
            assert reasons[-1] is not None, "a request never ended"
            assert all(reason is None for reason in reasons[:-1]), "a request ended twice"
            tokens = self.rig.tokens(request_id)
            # Nobody who stayed was given a page of one who moved.
            if request_id not in self.moved:
                assert tokens == expected_completion(request, slots, len(tokens))
            if reasons[-1] is FinishReason.LENGTH:
                limit = self.rig.scheduler.limits.max_num_tokens
                room = limit - len(request.prompt_token_ids)
                assert len(tokens) == min(request.sampling.max_tokens, room)
        # Everything can be had back.
        memory = self.rig.scheduler.memory
        assert memory.num_available_pages == memory.pages.num_ids
        memory.tree.evict_pages(memory.pages.num_ids)
        assert memory.pages.num_free == memory.pages.num_ids
        assert memory.states.num_free == memory.states.num_ids


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
