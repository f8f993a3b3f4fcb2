"""How a job looks while it is watched, and after."""

import io

from rich.console import Console

import kiln
from kiln_cli.status import duration
from kiln_cli.train.job_table import show_job, show_jobs
from kiln_cli.train.live_view import JobView
from kiln_cli.train.submit import outcome


def state(status="queued", **fields):
    config = {"adapter": "polite", "learning_rate": 1e-3, "seed": 0}
    job = {"id": "job_1", "kind": "grpo", "status": status, "effective_config": config}
    return kiln.JobState.of(job | fields)


def event(kind, at_s=0.0, **raw):
    return kiln.JobEvent(id="1-0", type=kind, at_s=at_s, raw={"type": kind, **raw})


def step(number, at_s, reward):
    metrics = {"reward_mean": reward, "loss": 0.5, "kl": 0.01}
    counts = {"step": number, "num_steps": 4, "num_tokens": 100 * number, "eta_s": 4.0 - number}
    return event("step", at_s, metrics=metrics, **counts)


def text_of(thing):
    console = Console(width=110, file=io.StringIO())
    console.print(thing) if not callable(thing) else thing(console)
    return console.file.getvalue()


def test_a_job_that_waits_shows_its_place():
    assert "queued, place 3 in the queue" in text_of(JobView(state(queue_position=2)))


def test_a_job_that_runs_shows_bar_curve_speed_and_time_left():
    view = JobView(state("running"))
    for entry in (event("started"), step(1, 10.0, 0.1), step(2, 11.0, 0.5), step(3, 12.0, 0.9)):
        view.take(entry)
    shown = text_of(view)
    assert "grpo → polite" in shown
    assert "step 3/4" in shown
    assert "100 tokens/s" in shown
    assert "1 s left" in shown
    assert "reward_mean ▁▄█ 0.9" in shown or "reward_mean ▁▅█ 0.9" in shown
    assert "loss 0.5  kl 0.01" in shown
    view.take(event("publishing"))
    assert "publishing" in text_of(view)


def test_how_a_job_ended_is_one_line():
    done = {"adapter": "polite", "version": 3, "not_live": ["boot-2"]}
    assert (
        outcome(state("succeeded", result=done))
        == "polite@3 is live, not yet on boot-2, and answers by default"
    )
    done = {"adapter": "polite", "version": 3}
    by_name = state("succeeded", result=done, effective_config={"attach": False})
    assert outcome(by_name) == "polite@3 is live by name; kiln adapters attach polite@3 makes it the default"
    assert outcome(state("succeeded")) == "succeeded; nothing was published"
    error = {"code": "out_of_memory", "message": "no room", "hint": "Lower batch_tokens."}
    assert outcome(state("failed", error=error)) == "failed: no room (out_of_memory)\n  Lower batch_tokens."
    cut = {"step": 2, "steps": 9}
    assert outcome(state("cancelled", progress=cut)) == "cancelled at step 2 of 9"


def test_a_gate_that_was_not_passed_says_why_and_what_was_kept():
    gate = {"passed": False, "reason": "the score 0.5 is below the least of 0.75"}
    held = state("succeeded", result={"adapter": "job_1", "version": 1, "gate": gate})
    assert outcome(held) == (
        "the gate was not passed: the score 0.5 is below the least of 0.75\n"
        "  nothing was published as polite; what the job learned is kept as job_1@1"
    )
    listed = text_of(lambda console: show_jobs(console, [held]))
    assert "gate not passed" in listed
    assert "job_1@1" not in listed
    assert "gate not passed" in text_of(lambda console: show_job(console, held))
    passed = state("succeeded", result={"adapter": "polite", "version": 3, "gate": {"passed": True}})
    assert outcome(passed) == "polite@3 is live, and answers by default"


def test_jobs_are_listed_and_one_is_shown_with_its_curve():
    assert "no jobs yet" in text_of(lambda console: show_jobs(console, []))
    history = [{"step": 1, "reward_mean": 0.2}, {"step": 2, "reward_mean": 0.8}]
    ended = state("succeeded", history=history, progress={"step": 2, "steps": 2, "tokens": 1234})
    assert "job_1  grpo" in text_of(lambda console: show_jobs(console, [ended]))
    shown = text_of(lambda console: show_job(console, ended))
    assert "step 2 of 2, 1,234 tokens" in shown
    assert "reward_mean ▁█ 0.2 → 0.8" in shown


def test_durations_are_read_at_a_glance():
    assert [duration(seconds) for seconds in (5, 90, 240, 7200, 200_000)] == [
        "5 s",
        "90 s",
        "4 min",
        "2.0 h",
        "2.3 days",
    ]
