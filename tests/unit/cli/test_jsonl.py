"""Training data files in their several forms."""

import pytest

from kiln_cli.errors import FileUnreadable, InvalidJsonl, InvalidSetting
from kiln_cli.sparkline import sparkline
from kiln_cli.train.jsonl import Row, grpo_groups, line_of_field, read_rows
from kiln_cli.train.settings import job_fields


def rows(*fields):
    return [Row(number, entry) for number, entry in enumerate(fields, start=1)]


def test_every_broken_line_is_named_with_its_number(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(['{"a": 1}', "", "{", '"text"', "[1]", '{"b": 2}']))
    with pytest.raises(InvalidJsonl) as caught:
        read_rows(str(path))
    assert "3 broken lines: line 3: " in str(caught.value)
    assert "line 4: not an object but str; line 5: not an object but list" in str(caught.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    path = tmp_path / "data.jsonl"
    text = f"one{separator}line"
    path.write_bytes(f'{{"a": "{text}"}}\r\n{{"a": 2}}'.encode())
    assert read_rows(str(path)) == [Row(1, {"a": text}), Row(2, {"a": 2})]


def test_many_broken_lines_are_counted_and_the_first_ten_shown(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" * 12)
    with pytest.raises(InvalidJsonl, match=r"12 broken lines: .*; and 2 more$"):
        read_rows(str(path))


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(FileUnreadable, match="No such file"):
        read_rows(str(tmp_path / "nowhere"))
    (tmp_path / "latin").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FileUnreadable, match="utf-8"):
        read_rows(str(tmp_path / "latin"))
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(InvalidJsonl, match="has no lines"):
        read_rows(str(tmp_path / "empty"))


def test_scored_answers_to_one_prompt_form_a_group():
    groups, lines = grpo_groups(
        "f",
        rows(
            {"prompt": "a", "completion": "1", "reward": 1},
            {"prompt": "b", "completion": "2", "reward": 2},
            {"prompt": "a", "completion": "3", "reward": {"length": 3}},
        ),
    )
    assert groups == [
        {"prompt": "a", "completions": [{"text": "1", "reward": 1}, {"text": "3", "reward": {"length": 3}}]},
        {"prompt": "b", "completions": [{"text": "2", "reward": 2}]},
    ]
    assert lines == [1, 2]


def test_answers_by_id_form_a_group_by_id_or_by_name():
    by_id = {"completion_id": "c1", "reward": 1}
    groups, _ = grpo_groups("f", rows(by_id, {**by_id, "index": 1}, {"completion_id": "c2", "reward": 0}))
    assert groups[0] == {"rollouts": [by_id, {**by_id, "index": 1}]}
    assert len(groups) == 2
    named, _ = grpo_groups(
        "f", rows({**by_id, "group": "g"}, {"completion_id": "c2", "reward": 0, "group": "g"})
    )
    assert named == [{"rollouts": [by_id, {"completion_id": "c2", "reward": 0}]}]


def test_whole_groups_stay_as_they_are_and_other_rows_are_refused():
    group = {"prompt": "a", "completions": [{"text": "1", "reward": 1}]}
    assert grpo_groups("f", rows(group))[0] == [group]
    with pytest.raises(
        InvalidJsonl, match=r"line 2: neither a group nor a scored answer \(it has completion, prompt\)"
    ):
        grpo_groups("f", rows(group, {"prompt": "a", "completion": "1"}))


def test_a_refused_field_is_traced_to_its_line():
    assert line_of_field("examples[1].completion", [1, 7]) == 7
    assert line_of_field("groups[0]", [3]) == 3
    assert line_of_field("learning_rate", [1]) is None
    assert line_of_field(None, [1]) is None
    assert line_of_field("examples[9]", [1]) is None


def test_settings_are_json_or_text_and_dots_make_objects():
    body = job_fields(
        ["schedule=cosine", "loss.kl.coef=0.1", 'metadata={"by": "me"}'], lora__rank=8, epochs=None, seed=0
    )
    assert body == {
        "lora": {"rank": 8},
        "seed": 0,
        "schedule": "cosine",
        "loss": {"kl": {"coef": 0.1}},
        "metadata": {"by": "me"},
    }


@pytest.mark.parametrize("setting", ["schedule", "=1", "a.=1", "seed.deep=1"])
def test_settings_that_are_none_are_refused(setting):
    with pytest.raises(InvalidSetting):
        job_fields([setting], seed=1)


def test_a_sparkline_runs_from_the_least_to_the_greatest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2, 2]) == "▄▄"
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert len(sparkline(list(range(1000)), width=40)) == 40
