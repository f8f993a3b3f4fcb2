"""The comparison of drafts by an adapter's own MTP layer with those by the base model's, on a job of one step."""

from __future__ import annotations

from benchmarks.adapted_drafts import (
    compare,
    demo_engine,
    in_another_voice,
    parse,
    taught_examples,
    train,
    training_request,
)
from kiln_nn.lora import parse_adapter


def test_the_voice_changes_words_and_nothing_else():
    assert in_another_voice("Hello Tom,\nis the hello-kitty yours? My best") == (
        "Ahoy Tom,\nbe th' ahoy-kitty yours? Me fair winds"
    )


def test_one_job_is_served_with_and_without_its_mtp_matrices():
    options = parse(["--requests", "2", "--batch", "1", "--temperatures", "0"])
    with demo_engine(options.batch, 3) as spine:
        trained = train(spine, training_request(taught_examples(2), epochs=1))
        both, main = (
            parse_adapter(files.config_json, files.weights, spine.config).tensors
            for files in (trained, trained.without_mtp(spine.config))
        )
        assert {path for path in both if not path.startswith("mtp.")} == main.keys() != both.keys()
        runs = compare(spine, trained, options)
    assert runs["own MTP", 0.0].answers == runs["base's MTP", 0.0].answers
    assert all(run.num_proposed > run.num_accepted > 0 for run in runs.values())
    assert spine.speculator is not None
    assert {totals.adapter for totals in spine.speculator.totals()} == {"", "base's MTP", "own MTP"}
