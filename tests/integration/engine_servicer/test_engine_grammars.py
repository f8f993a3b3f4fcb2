"""The engine's rules about output, on the demo model, over gRPC: grammars and the end of thinking."""

import asyncio
import json
import re

import jsonschema
import pytest

from benchmarks.output_schemas import SCHEMAS
from kiln_common.pb import engine_pb2
from kiln_common.text.tokenizer import TextTokenizer
from kiln_engine.simulation.runner import SimulatedRunner
from tests.support.demo_serving import DEMO_MODEL, DEVICE, demo_engine
from tests.support.engine_server import VOCAB_SIZE, collect, generate_request, make_parts, running_engine

STOP = engine_pb2.FINISH_REASON_STOP
LENGTH = engine_pb2.FINISH_REASON_LENGTH
ERROR = engine_pb2.FINISH_REASON_ERROR
TOKENIZER = TextTokenizer.load(DEMO_MODEL)
THINK_END = TOKENIZER.id_of("</think>")
TURN_END = TOKENIZER.id_of("<|im_end|>")
PROMPT = TOKENIZER.encode("<|im_start|>user\nSend me the data.<|im_end|>\n<|im_start|>assistant\n")
OPEN = TOKENIZER.encode("<think>\n")
CLOSED = TOKENIZER.encode("<think>\n\n</think>\n\n")
BEFORE, AFTER = TOKENIZER.encode("\n"), TOKENIZER.encode("\n\n")


@pytest.fixture
async def client(tmp_path):
    # No grammar here shall be refused because the machine is busy.
    async with demo_engine(tmp_path, grammar_time_limit_s=30) as client:
        yield client


def constrained(name="r", *, is_thinking=False, budget=None, **fields):
    grammar = fields.pop("grammar", None)
    request = generate_request(
        name, PROMPT + (OPEN if is_thinking else CLOSED), **{"ignore_eos": False, "max_tokens": 400, **fields}
    )
    if grammar:
        request.grammar.CopyFrom(grammar)
    if is_thinking:
        request.thinking.CopyFrom(
            engine_pb2.Thinking(
                end_token_id=THINK_END,
                budget_tokens=budget,
                before_end_token_ids=BEFORE,
                after_end_token_ids=AFTER,
            )
        )
    return request


def schema(value) -> engine_pb2.Grammar:
    return engine_pb2.Grammar(json_schema=json.dumps(value))


def ids_of(outputs):
    assert outputs[-1].error.code == "", outputs[-1].error
    return [token for output in outputs for token in output.token_ids]


def text_of(outputs):
    """The text, without the token that ended it."""
    ids = ids_of(outputs)
    return TOKENIZER.decode(ids[:-1] if outputs[-1].finish_reason == STOP else ids)


async def test_what_stops_is_valid_for_every_schema_side_by_side_with_free_text(client):
    named = [(f"{index}-{seed}", item) for index, item in enumerate(SCHEMAS) for seed in range(2)]
    requests = [
        constrained(name, grammar=schema(item.schema), seed=seed) for seed, (name, item) in enumerate(named)
    ]
    alone = ids_of(await collect(client, constrained("alone", seed=5, max_tokens=40)))
    free, *answers = await asyncio.gather(
        *(collect(client, request) for request in [constrained("free", seed=5, max_tokens=40), *requests])
    )
    if DEVICE == "cpu":  # elsewhere the arithmetic may depend on the batch
        assert ids_of(free) == alone
    num_stopped = 0
    for (_, item), outputs in zip(named, answers, strict=True):
        text = text_of(outputs)
        if outputs[-1].finish_reason == STOP:
            num_stopped += 1
            jsonschema.validate(json.loads(text), item.schema, jsonschema.Draft202012Validator)
            assert ids_of(outputs)[-1] in (TURN_END, TOKENIZER.id_of("<|endoftext|>"))
        else:
            assert not item.is_bounded, (item.name, text)
    assert num_stopped >= 32


async def test_a_seeded_answer_under_a_grammar_is_the_same_again_and_has_both_log_probabilities(client):
    grammar = schema(SCHEMAS[0].schema)
    first = await collect(client, constrained("a", grammar=grammar, seed=3, num_top_logprobs=3))
    others = [collect(client, constrained(f"o{i}", seed=i, max_tokens=60)) for i in range(3)]
    again, *_ = await asyncio.gather(collect(client, constrained("b", grammar=grammar, seed=3)), *others)
    if DEVICE == "cpu":
        assert ids_of(again) == ids_of(first)
        assert [logprob for output in again for logprob in output.logprobs] == pytest.approx(
            [logprob for output in first for logprob in output.logprobs], abs=1e-3
        )
    brace, sampled = first[0].logprobs[0], first[0].sampled_logprobs[0]
    assert TOKENIZER.decode([first[0].token_ids[0]]).startswith("{")
    # The model alone would hardly begin so; under the grammar there are two ways at most.
    assert brace < -2.0 < sampled <= 0.0
    top = first[0].top_logprobs[0]
    assert max(top.logprobs) > brace


async def test_a_greedy_answer_is_the_most_likely_of_what_is_allowed(client):
    grammar = engine_pb2.Grammar(regex="(yes|no|[0-9]{3})")
    outputs = await collect(client, constrained(grammar=grammar, temperature=0.0))
    again = await collect(client, constrained("again", grammar=grammar, temperature=0.0, seed=99))
    assert ids_of(outputs) == ids_of(again)
    assert re.fullmatch("yes|no|[0-9]{3}", text_of(outputs))
    assert outputs[-1].finish_reason == STOP


@pytest.mark.parametrize(
    ("grammar", "allowed"),
    [
        (engine_pb2.Grammar(regex="(yes|no) [0-9]{2}"), r"(yes|no) [0-9]{2}"),
        (engine_pb2.Grammar(lark='start: "a" ("b" | "c")~1..3'), r"a[bc]{1,3}"),
        (engine_pb2.Grammar(ebnf='root ::= "x" ("y" | "z") [0-9]'), r"x[yz][0-9]"),
    ],
)
async def test_every_language(client, grammar, allowed):
    for seed in range(3):
        outputs = await collect(client, constrained(f"r{seed}", grammar=grammar, seed=seed))
        assert re.fullmatch(allowed, text_of(outputs))


async def test_the_grammar_begins_after_the_thinking_which_ends_when_its_budget_is_spent(client):
    grammar = schema(SCHEMAS[2].schema)
    requests = [
        constrained(f"r{budget}", grammar=grammar, is_thinking=True, budget=budget, seed=budget)
        for budget in (0, 1, 7, 30)
    ]
    for request, outputs in zip(
        requests, await asyncio.gather(*(collect(client, r) for r in requests)), strict=True
    ):
        ids = ids_of(outputs)
        end = ids.index(THINK_END)
        assert end <= request.thinking.budget_tokens + len(BEFORE)
        assert ids[end + 1 : end + 1 + len(AFTER)] == AFTER
        json.loads(TOKENIZER.decode(ids[end + 1 + len(AFTER) : -1]))
        assert outputs[-1].finish_reason == STOP
        if end == request.thinking.budget_tokens + len(BEFORE):  # forced, not chosen
            flat = [logprob for output in outputs for logprob in output.sampled_logprobs]
            assert flat[end - len(BEFORE) : end + 1 + len(AFTER)] == [0.0] * (len(BEFORE) + 1 + len(AFTER))


async def test_a_budget_leaves_free_text_after_it(client):
    outputs = await collect(client, constrained(is_thinking=True, budget=5, ignore_eos=True, max_tokens=30))
    ids = ids_of(outputs)
    assert len(ids) == 30
    assert THINK_END in ids[: 5 + len(BEFORE) + 1]


async def test_thinking_before_a_grammar_cannot_end_the_completion(client):
    ends = {"logit_bias": {TURN_END: 100.0, TOKENIZER.id_of("<|endoftext|>"): 100.0}}
    request = constrained(grammar=schema({"type": "null"}), is_thinking=True, budget=12, **ends)
    outputs = await collect(client, request)
    assert TOKENIZER.decode(ids_of(outputs)[:-1]).endswith("</think>\n\nnull")


async def test_a_grammar_that_has_come_to_its_end_stops_before_min_tokens(client):
    request = constrained(grammar=schema({"enum": ["a"]}), min_tokens=50)
    outputs = await collect(client, request)
    assert text_of(outputs) == '"a"'
    assert outputs[-1].finish_reason == STOP


async def test_min_tokens_and_max_tokens_hold_under_a_grammar(client):
    at_least = constrained("a", grammar=engine_pb2.Grammar(regex="[a-z]{0,200}"), min_tokens=20, seed=4)
    outputs = await collect(client, at_least)
    assert len(ids_of(outputs)) > 20
    at_most = constrained("b", grammar=engine_pb2.Grammar(regex="[a-z]{200}"), max_tokens=5)
    outputs = await collect(client, at_most)
    assert (len(ids_of(outputs)), outputs[-1].finish_reason) == (5, LENGTH)


async def test_penalties_and_bias_choose_among_what_is_allowed(client):
    letter = {token: TOKENIZER.id_of(token) for token in "ab"}
    request = constrained(
        grammar=engine_pb2.Grammar(regex="[ab]{12}"),
        temperature=0.0,
        presence_penalty=0.1,
        logit_bias={letter["b"]: 50.0, TOKENIZER.id_of("c"): 100.0},
    )
    outputs = await collect(client, request)
    assert text_of(outputs).count("b") >= 6
    assert set(text_of(outputs)) <= set("ab")


async def test_a_trigger_begins_the_grammar_and_its_end_leaves_the_text_free(client):
    opening, closing = TOKENIZER.id_of("<tool_call>"), TOKENIZER.id_of("</tool_call>")
    grammar = engine_pb2.Grammar(lark=f'start: "[" /[0-9]{{2}}/ "]" <[{closing}]>', trigger_token_id=opening)
    biased = {"logit_bias": {opening: 12.0}, "ignore_eos": False}
    outputs = await collect(client, constrained(grammar=grammar, seed=1, max_tokens=120, **biased))
    text = TOKENIZER.decode(ids_of(outputs))
    pieces = text.split("<tool_call>")
    assert len(pieces) > 2
    assert all(re.match(r"\[[0-9]{2}\]</tool_call>", piece) for piece in pieces[1:-1])


@pytest.mark.parametrize(
    ("grammar", "code"),
    [
        (engine_pb2.Grammar(json_schema='{"not": {}}'), "grammar_not_supported"),
        (engine_pb2.Grammar(json_schema="{"), "grammar_not_supported"),
        (engine_pb2.Grammar(regex="(?=a)b"), "grammar_not_supported"),
        (engine_pb2.Grammar(ebnf="root := x"), "grammar_not_supported"),
        (engine_pb2.Grammar(ebnf="root ::= nobody"), "grammar_not_supported"),
        (engine_pb2.Grammar(ebnf="root ::= a[@{start:\\"), "grammar_not_supported"),
        (engine_pb2.Grammar(regex="(a|b|c[def]{1,10})" * 50_000), "grammar_too_large"),
        (engine_pb2.Grammar(json_schema='{"items":' * 5000 + "{}" + "}" * 5000), "grammar_too_large"),
        (engine_pb2.Grammar(), "invalid_value"),
    ],
)
async def test_what_cannot_be_enforced_is_refused_with_the_reason(client, grammar, code):
    request = constrained(grammar=engine_pb2.Grammar(regex="a"))
    request.grammar.CopyFrom(grammar)
    request.grammar.SetInParent()
    [output] = await collect(client, request)
    assert (output.finish_reason, output.error.code) == (ERROR, code)
    assert output.error.message


async def test_a_grammar_that_grows_beyond_its_limits_fails_its_own_request_only(client):
    rules = "\n".join(f'r{i}: "x{i}" r{(i * 7) % 6000}' for i in range(6000))
    lark = "start: " + " | ".join(f"r{i}" for i in range(6000)) + "\n" + rules
    free = asyncio.create_task(collect(client, constrained("free", max_tokens=60, ignore_eos=True)))
    outputs = await collect(client, constrained("huge", grammar=engine_pb2.Grammar(lark=lark)))
    assert outputs[-1].error.code == "grammar_failed"
    assert len(ids_of(await free)) == 60


async def test_a_model_without_a_tokenizer_takes_no_grammars(tmp_path):
    parts = make_parts(SimulatedRunner(vocab_size=VOCAB_SIZE))
    async with running_engine(parts, tmp_path) as (_, client):
        request = generate_request(grammar=engine_pb2.Grammar(regex="a"), ignore_eos=False)
        [output] = await collect(client, request)
        assert output.error.code == "grammars_unavailable"
        assert len(ids_of(await collect(client, generate_request("free")))) == 4
