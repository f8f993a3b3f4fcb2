"""Tokenising turn by turn gives what tokenising the whole does."""

import random

import pytest

from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat import turn_tokens
from kiln_gateway.chat.turn_tokens import TurnEncoder
from tests.support.gateway import REPOSITORY, write_model_folder

MARK = "<|im_start|>"


@pytest.fixture(scope="module", params=["demo", "tiny"])
def tokenizer(request, tmp_path_factory):
    if request.param == "demo":
        return TextTokenizer.load(REPOSITORY / "demo" / "model")
    return TextTokenizer.load(write_model_folder(tmp_path_factory.mktemp("model")))


def test_turns_have_the_tokens_of_the_whole_text(tokenizer):
    draw = random.Random(1)
    alphabet = [MARK, "<|im_end|>", "\n", "  ", "thank", " you", "<|im", "é", "🙂", "<think>", "x"]
    encoder = TurnEncoder(tokenizer)
    for _ in range(200):
        text = "".join(draw.choices(alphabet, k=draw.randrange(40)))
        assert encoder.encode(text).token_ids == tokenizer.encode(text)


def test_the_places_of_turns_are_those_of_their_marks(tokenizer):
    text = f"Before.{MARK}user\nHi<|im_end|>\n{MARK}assistant\nHello"
    encoded = TurnEncoder(tokenizer).encode(text)
    mark_id = tokenizer.id_of(MARK)
    marks = [place for place, token_id in enumerate(encoded.token_ids) if token_id == mark_id]
    assert [token for _, token in encoded.turns] == marks
    assert [character for character, _ in encoded.turns] == [7, text.rindex(MARK)]
    assert encoded.num_tokens_before_turn(6) == 0
    assert encoded.num_tokens_before_turn(len(text)) == marks[1]


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(tokenizer, monkeypatch):
    monkeypatch.setattr(turn_tokens, "_MOST_CHARACTERS", 200)
    monkeypatch.setattr(turn_tokens, "_LONGEST_TURN", 100)
    read = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: read.append(text) or encode(text))
    encoder = TurnEncoder(tokenizer)
    for name in "aab":
        encoder.encode(name * 80)
    assert len(read) == 2
    encoder.encode("c" * 80)
    encoder.encode("b" * 80)
    encoder.encode("a" * 80)
    assert [text[0] for text in read] == ["a", "b", "c", "a"]
    encoder.encode("d" * 101)
    encoder.encode("d" * 101)
    assert read.count("d" * 101) == 2
