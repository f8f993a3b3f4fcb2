from kiln_engine.scheduling import SchedulerLimits
from kiln_engine.simulation.__main__ import table
from kiln_engine.simulation.simulate import StepCosts, simulate
from kiln_engine.simulation.workload import WorkloadShape, make_workload


def run(run_ahead: int, num_pages: int = 300, seed: int = 0):
    shape = WorkloadShape(num_requests=40)
    limits = SchedulerLimits(
        num_pages=num_pages, num_state_slots=24, max_model_len=1024, max_running=16, step_token_budget=256
    )
    workload = make_workload(shape, seed)
    return simulate(
        workload, limits, StepCosts(), vocab_size=shape.vocab_size, run_ahead=run_ahead, is_checking=True
    )


def test_a_workload_runs_to_its_end_the_same_way_each_time(run_ahead):
    first, second = run(run_ahead), run(run_ahead)
    assert first.num_ended == 40
    assert table(first) == table(second)
    assert first.stats.num_cached_tokens > 0


def test_too_few_pages_preempt_and_still_end_everything(run_ahead):
    assert run(run_ahead).stats.num_preemptions == 0
    crowded = run(run_ahead, num_pages=70)
    assert crowded.stats.num_preemptions > 0
    assert crowded.num_ended == 40
