"""What `kiln bench` makes of answers."""

from kiln_cli.bench.load import Measured, figures, percentiles_ms


def test_rates_count_good_answers_and_failures_are_named():
    answers = [
        Measured((0.1, 0.2, 0.4), 10, 3, ""),
        Measured((0.3, 0.4, 0.5), 10, 3, ""),
        Measured((), 0, 0, "overloaded: too much"),
        Measured((), 5, 0, ""),
    ]
    found = figures(answers, 2.0)
    assert (found["requests"], found["failed"], found["first_error"]) == (4, 2, "overloaded: too much")
    assert (found["output_tokens"], found["output_tokens_per_s"], found["requests_per_s"]) == (6, 3.0, 1.0)
    assert found["first_token_ms"] == {"p50": 100.0, "p90": 300.0, "p99": 300.0}
    assert found["between_tokens_ms"]["p99"] == 200.0


def test_percentiles_are_of_the_nearest_rank():
    assert percentiles_ms([n / 1000 for n in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles_ms([]) is None
