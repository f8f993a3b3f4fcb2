"""Stop strings and `min_tokens`, however many tokens an engine's steps bring (drafts bring several)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kiln_common.pb import engine_pb2
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.choice import ChoiceAssembler, TextRules
from tests.support.gateway import build_tokenizer

TOKENIZER = TextTokenizer(build_tokenizer())
TEXT = "One END, two END, three END, four."
TOKENS = TOKENIZER.encode(TEXT)


def answered(min_tokens, step_sizes=(), stop="END"):
    """The choice after TEXT came in steps of these sizes, and then one by one, as long as it goes on."""
    assembler = ChoiceAssembler(TOKENIZER, TextRules(stop_strings=[stop], min_tokens=min_tokens))
    left, sizes, streamed = list(TOKENS), list(step_sizes), ""
    while left and not assembler.is_finished:
        size = sizes.pop(0) if sizes else 1
        step, left = left[:size], left[size:]
        zeros = [0.0] * len(step)
        reason = engine_pb2.FINISH_REASON_UNSPECIFIED if left else engine_pb2.FINISH_REASON_LENGTH
        output = engine_pb2.SequenceOutput(
            token_ids=step, logprobs=zeros, sampled_logprobs=zeros, finish_reason=reason
        )
        streamed += assembler.push(output).content
    assert streamed == assembler.content
    return assembler


def num_tokens_to(text):
    """How many tokens it takes until `text` has been said."""
    return next(n for n in range(len(TOKENS) + 1) if TOKENIZER.decode(TOKENS[:n]).startswith(text))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(TOKENS) + 3), st.lists(st.integers(1, 8), max_size=20))
def test_the_first_stop_string_behind_min_tokens_ends_the_answer(min_tokens, step_sizes):
    ends = [TEXT[: place + 3] for place in range(len(TEXT)) if TEXT.startswith("END", place)]
    in_time = [text for text in ends if num_tokens_to(text) > min_tokens]
    choice = answered(min_tokens, step_sizes)
    if in_time:
        assert (choice.content, choice.finish_reason) == (in_time[0][:-3], "stop")
        assert len(choice.tokens) == num_tokens_to(in_time[0]) > min_tokens
        assert choice.stop_string == "END"
    else:
        assert (choice.content, choice.finish_reason) == (TEXT, "length")
        assert choice.stop_string is None


def test_a_stop_string_may_begin_before_min_tokens():
    first = num_tokens_to("One END")
    assert num_tokens_to("One E") < first  # it spans tokens
    assert answered(first - 1).content == "One "
    assert answered(first).content == "One END, two "
