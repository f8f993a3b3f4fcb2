"""Two models whose token ids mean the same have one vocabulary hash."""

import json

import pytest

from kiln_common.text.vocabulary import vocabulary_hash


def folder_with(path, vocab, added=(), **model):
    path.mkdir()
    tokens = [{"id": token_id, "content": text} for token_id, text in added]
    raw = {"added_tokens": tokens, "model": {"vocab": vocab, **model}}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    return vocabulary_hash(path)


def test_it_is_that_of_ids_and_texts_alone(tmp_path):
    first = folder_with(tmp_path / "a", {"x": 0, "y": 1}, [(2, "<end>")], merges=[["x", "y"]])
    assert len(first) == 64
    assert first == folder_with(tmp_path / "b", {"y": 1, "x": 0}, [(2, "<end>")], merges=[])
    assert first != folder_with(tmp_path / "c", {"x": 1, "y": 0}, [(2, "<end>")])
    assert first != folder_with(tmp_path / "d", {"x": 0, "y": 1}, [(2, "<stop>")])
    assert first == folder_with(tmp_path / "e", [["x", -1.0], ["y", -2.0]], [(2, "<end>")])


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert vocabulary_hash(tmp_path) == ""


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_a_broken_tokenizer_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError):
        vocabulary_hash(tmp_path)
