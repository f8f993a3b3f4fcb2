"""Tokenizer and detokenizer: bytes, special tokens, characters that span tokens."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from kiln_common.model_folder import ModelFileNotRead
from kiln_common.text.detokenizer import IncrementalDetokenizer
from kiln_common.text.tokenizer import InvalidText, TextTokenizer, TokenizerUnusable
from tests.support.failing_disk import break_file
from tests.support.gateway import SPECIAL_TOKENS, build_tokenizer

TOKENIZER = TextTokenizer(build_tokenizer())


def pieces_of(token_ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_one_token_at_a_time(text):
    assume(not any(token in text for token in SPECIAL_TOKENS))  # those give no text
    assert "".join(pieces_of(TOKENIZER.encode(text))) == text


def test_a_character_comes_out_whole_with_its_last_byte():
    token_ids = TOKENIZER.encode("🙂")
    assert len(token_ids) == 4
    assert pieces_of(token_ids) == ["", "", "", "🙂", ""]


def test_an_unfinished_character_becomes_the_replacement_character_at_the_end():
    token_ids = TOKENIZER.encode("a🙂")[:-1]
    assert pieces_of(token_ids) == ["a", "", "", "", "\ufffd"]


def test_a_byte_that_cannot_continue_a_character_does_not_hold_back_what_follows():
    broken = TOKENIZER.encode("🙂")[0]
    assert "".join(pieces_of([broken, *TOKENIZER.encode("ok")])) == "\ufffdok"


def test_end_marks_give_no_text_and_think_marks_do():
    ids = [TOKENIZER.id_of("<think>"), *TOKENIZER.encode("x"), TOKENIZER.id_of("<|im_end|>")]
    assert "".join(pieces_of(ids)) == "<think>x"
    assert TOKENIZER.decode(ids) == "<think>x<|im_end|>"


def test_ids_beyond_the_tokenizer_give_nothing():
    assert TOKENIZER.bytes_of(TOKENIZER.num_tokens + 5) == b""


def test_an_unpaired_surrogate_is_refused():
    with pytest.raises(InvalidText, match="character 1"):
        TOKENIZER.encode("a\ud800")


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    with pytest.raises(TokenizerUnusable):
        TextTokenizer(Tokenizer(models.BPE()))


def test_a_failing_disk_is_told_from_a_tokenizer_that_is_none(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerUnusable, match="does not exist"):
        TextTokenizer.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(TokenizerUnusable, match="cannot be read"):
        TextTokenizer.load(tmp_path)
    break_file(path)
    with pytest.raises(ModelFileNotRead, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(TokenizerUnusable, match="cannot be read"):
        TextTokenizer.load(tmp_path)
    path.rmdir()
    build_tokenizer().save(str(path))
    assert TextTokenizer.load(tmp_path).num_tokens == TOKENIZER.num_tokens


def test_a_text_with_far_too_many_tokens_is_found_out_without_all_of_them(monkeypatch):
    read = []
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: read.append(len(text)) or encode(text))
    assert not TOKENIZER.has_far_more_tokens("ab " * 1000, 10)  # short enough to look
    assert read == []
    assert TOKENIZER.has_far_more_tokens("ab " * 10**6, 10)  # no token is that long
    assert read == []
    assert TOKENIZER.has_far_more_tokens("\n" * 10**6, 150_000)
    assert sum(read) < 500_000
    read.clear()
    assert not TOKENIZER.has_far_more_tokens("x" * 400_000, 400_000)
    assert not TOKENIZER.has_far_more_tokens("x" * 400_000, 395_000)  # within the margin: the caller looks
