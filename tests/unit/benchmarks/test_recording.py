"""From arrivals to figures: which steps count as decode, and what a failed request does."""

import pytest

from benchmarks.engine.recording import (
    Distribution,
    Recorder,
    Recording,
    RequestFailed,
    TooFewSteps,
)
from kiln_engine.domain import FinishReason, RowResult, SequenceEvent


def event(request_id, *, first=False, finish=None):
    return SequenceEvent(request_id, RowResult(1, 5, -1.0, -1.0), finish, is_first=first)


def recording_of(num_decode_steps, *, step_s=0.01, slow_step_s=0.5):
    """Two requests: a starts a step before b, both decode, a ends first; slow steps around the phase."""
    time_s = slow_step_s
    arrivals = [(time_s, [event("a", first=True)])]
    time_s += slow_step_s
    arrivals.append((time_s, [event("a"), event("b", first=True)]))
    for _ in range(num_decode_steps):
        time_s += step_s
        arrivals.append((time_s, [event("a"), event("b")]))
    arrivals.append((time_s + slow_step_s, [event("a", finish=FinishReason.LENGTH), event("b")]))
    arrivals.append((time_s + 2 * slow_step_s, [event("b", finish=FinishReason.LENGTH)]))
    return Recording(0.0, 2, arrivals)


def test_decode_steps_are_whole_pages_between_the_last_first_token_and_the_first_end():
    window = recording_of(40).decode_window()
    assert len(window.steps_s) == 32
    assert window.steps_s == pytest.approx([0.01] * 32)
    # One step alone, one with b's first token, two that settle, and half of the window.
    assert window.mean_num_outputs == pytest.approx(0.5 + 1 + 2 + 16)


def test_too_few_decode_steps_are_refused():
    with pytest.raises(TooFewSteps, match="12 steps"):
        recording_of(13).decode_window()


def test_a_missing_row_is_refused():
    recording = recording_of(40)
    recording.arrivals[10][1].pop()
    with pytest.raises(TooFewSteps, match="not every request"):
        recording.decode_window()


def test_first_tokens_and_rate():
    recording = recording_of(16)
    assert recording.first_token_s == pytest.approx([0.5, 1.0])
    assert recording.num_tokens == 1 + 2 + 32 + 2 + 1
    assert recording.duration_s == pytest.approx(1.0 + 0.16 + 1.0)


def test_a_request_that_ended_otherwise_than_asked_fails_the_run():
    recorder = Recorder(1)
    recorder.offer([event("a", first=True)])
    recorder.offer([SequenceEvent("a", finish_reason=FinishReason.ERROR, error=None)])
    with pytest.raises(RequestFailed, match="ERROR"):
        recorder.wait(1)


def test_a_run_that_does_not_end_fails():
    with pytest.raises(RequestFailed, match="2 requests had not ended"):
        Recorder(2).wait(0.01)


def test_ends_are_reported_while_others_go_on():
    ends = []
    recorder = Recorder(2, on_ends=ends.append)
    recorder.offer([event("a", finish=FinishReason.LENGTH)])
    recorder.offer([event("b", finish=FinishReason.LENGTH)])
    assert ends == [1]
    assert recorder.wait(1).num_tokens == 2


def test_percentiles_are_interpolated():
    times = Distribution.of([0.004, 0.001, 0.003, 0.002])
    assert times.p50_ms == pytest.approx(2.5)
    assert times.mean_ms == pytest.approx(2.5)
    assert times.p99_ms == pytest.approx(3.97)
