"""The demo model's training text: seeded, hashed, packed, and free of what is measured on."""

import itertools
import random
import statistics

import torch
from tokenizers import Tokenizer

from demo.data import conversations, emails, sums, tools
from demo.data.corpus import CONTEXT_WEIGHT, make_shard, packed_steps
from demo.data.rendering import render_with_answer
from demo.data.tokenizer import MARKUP_TOKENS, TURN_END, train_tokenizer
from demo.measure import expected_call
from demo.train_model import REPOSITORY
from kiln_cli.demo.prompts import HELD_OUT_PAIRS, email_prompt
from kiln_cli.demo.reward import score

TOKENIZER_PATH = REPOSITORY / "demo" / "model" / "tokenizer.json"
SAMPLE_SHA256 = "a1a3d485f7033c346af6ddc7c9b9177059a892d3b59a0325238ae8163f7ef517"


def test_the_same_seed_gives_the_same_tokens():
    corpus = make_shard(str(TOKENIZER_PATH), seed=0, shard=0, num_documents=100)
    assert corpus.sha256() == SAMPLE_SHA256
    assert make_shard(str(TOKENIZER_PATH), seed=0, shard=1, num_documents=100).sha256() != SAMPLE_SHA256


def test_the_committed_tokenizer_is_the_one_the_script_trains():
    assert train_tokenizer(seed=0).to_str() == Tokenizer.from_file(str(TOKENIZER_PATH)).to_str()


def test_the_tokenizer_gives_back_any_text_and_keeps_marks_whole():
    tokenizer = Tokenizer.from_file(str(TOKENIZER_PATH))
    for text in ("Hi Maria,\n\nSee  you at 10:45!", "naïve café 東京 🙂\t\r\n", "17 + 25 = 42."):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("2025").ids) == 4
    for mark in (*MARKUP_TOKENS, TURN_END):
        assert tokenizer.encode(mark).ids == [tokenizer.token_to_id(mark)]
    marked = "<think>\n</think><tool_call>"
    assert tokenizer.decode(tokenizer.encode(marked + TURN_END).ids) == marked


def test_held_out_pairs_and_sums_never_appear():
    rng = random.Random(5)
    asked = [emails.request(rng) for _ in range(5000)]
    assert not {(r.name, r.topic.the) for r in asked if r.topic} & set(HELD_OUT_PAIRS)
    drawn = [sums.draw(rng) for _ in range(5000)]
    assert not any(sums.is_held_out(wanted) for wanted in drawn)
    assert sums.is_held_out(sums.draw(rng, held_out=True))


def test_replies_leave_the_reward_room_to_rise_and_differ_within_a_prompt():
    rng = random.Random(6)
    wanted = emails.Request("Maria", emails.Topic("document", "late invoice"))
    prompt = email_prompt("Maria", "the late invoice")
    rewards = [score(prompt, emails.reply(rng, wanted)) for _ in range(1000)]
    assert 0.35 < statistics.mean(rewards) < 0.55
    assert statistics.stdev(rewards) > 0.2


def test_sums_and_their_steps_are_right():
    rng = random.Random(7)
    for _ in range(500):
        wanted = sums.draw(rng)
        assert eval(f"{wanted.left} {wanted.sign} {wanted.right}") == wanted.result
        assert sums.steps(wanted).endswith(f"So {wanted.result}.")
        for part in sums.steps(wanted).split(". ")[:2]:
            left, _, right = part.split(": ")[1].partition(" = ")
            assert eval(left) == int(right)


def test_a_call_in_the_text_is_what_the_template_writes():
    used, block = tools.case(random.Random(8))
    messages = [{"role": "user", "content": used.question}]
    _, added = render_with_answer(messages, tools.call_message(used), block)
    assert added == expected_call(used) + "<|im_end|>\n"


def test_every_conversation_renders_and_ends_its_turn():
    rng = random.Random(9)
    for _ in range(500):
        drawn = conversations.draw(rng)
        _, added = render_with_answer(drawn.messages, drawn.answer, drawn.tools, thinking=drawn.thinking)
        assert added.endswith("<|im_end|>\n")
        assert drawn.thinking == ("</think>" in added)


def test_packing_keeps_whole_documents_and_never_predicts_across_them():
    corpus = make_shard(str(TOKENIZER_PATH), seed=0, shard=0, num_documents=60)
    steps = list(itertools.islice(packed_steps(corpus, 1500, seed=0), 8))
    documents = {
        tuple(step.token_ids_T[start:end].tolist())
        for step in steps
        for start, end in itertools.pairwise(step.cu_seqlens)
    }
    starts = [0, *itertools.accumulate(corpus.lengths)]
    assert documents <= {tuple(corpus.ids[a:b]) for a, b in itertools.pairwise(starts)}
    step = steps[0]
    assert step.cu_seqlens[-1] == len(step.token_ids_T) <= 1500
    assert set(step.weight_T.tolist()) == {1.0, torch.tensor(CONTEXT_WEIGHT).item()}
    ends = set(step.cu_seqlens[1:])
    for shift in (1, 2):
        positions = step.target_positions(shift).tolist()
        assert len(positions) == len(step.token_ids_T) - shift * len(ends)
        assert not any(p + s in ends for p in positions for s in range(1, shift + 1))
