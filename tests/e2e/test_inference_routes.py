"""The inference routes on the real services: what one route says of a text agrees with what another says."""

import httpx
import pytest

from tests.support.stack import wait_for

pytestmark = pytest.mark.processes

PROMPT = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def complete(stack, **fields):
    response = stack.post("/v1/completions", {"model": "base", "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def engine_holds(stack):
    engine = stack.get("/v1/stats")["engine"]
    return (
        engine["running"] + engine["waiting"],
        engine["pages_in_use"] - engine["pages_cached"],
        engine["state_slots_in_use"] - engine["state_slots_cached"],
    )


def test_a_text_is_scored_as_it_was_generated(stack):
    # Float32 sums in another order: prefill in one pass here, token by token there.
    made = complete(stack, prompt=PROMPT, max_tokens=24, logprobs=1, return_token_ids=True, ignore_eos=True)
    ids = made["prompt_token_ids"] + made["token_ids"]
    scored = complete(stack, prompt=ids, max_tokens=0, prompt_logprobs=1)["prompt_logprobs"]
    of_completion = [
        entry[str(token_id)]["logprob"]
        for token_id, entry in zip(made["token_ids"], scored[-len(made["token_ids"]) :], strict=True)
    ]
    assert of_completion == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-3)


def test_embeddings_do_not_depend_on_their_company_and_leave_nothing_behind(stack):
    texts = [f"Thank you for letter number {i}, and for the {'very ' * i}kind words." for i in range(40)]
    together = stack.post("/v1/embeddings", {"model": "base", "input": texts}).json()["data"]
    for index in (0, 17, 39):
        alone = stack.post("/v1/embeddings", {"model": "base", "input": texts[index]}).json()["data"][0]
        assert together[index]["embedding"] == pytest.approx(alone["embedding"], abs=1e-4)
    lengths = [sum(value * value for value in entry["embedding"]) for entry in together]
    assert lengths == pytest.approx([1.0] * len(texts), abs=1e-5)
    wait_for(lambda: engine_holds(stack) == (0, 0, 0), "what the embeddings held")


def test_the_same_question_gets_the_same_answer_in_every_shape(stack):
    question = [{"role": "user", "content": "What is 3 + 4?"}]
    settings = {"model": "base", "temperature": 0}
    plain = {"chat_template_kwargs": {"enable_thinking": False}}
    chat = stack.post(
        "/v1/chat/completions", {**settings, **plain, "messages": question, "max_tokens": 32}
    ).json()
    answer = chat["choices"][0]["message"]["content"]
    message = stack.post("/v1/messages", {**settings, "messages": question, "max_tokens": 32}).json()
    assert "".join(block["text"] for block in message["content"]) == answer
    response = stack.post(
        "/v1/responses", {**settings, **plain, "input": question[0]["content"], "max_output_tokens": 32}
    ).json()
    assert "".join(part["text"] for item in response["output"] for part in item["content"]) == answer
    batch = stack.post(
        "/v1/completions/batch", {**settings, **plain, "prompts": [question] * 3, "max_tokens": 32}
    ).json()
    assert [entry["choices"][0]["message"]["content"] for entry in batch["data"]] == [answer] * 3
    following = {"input": "And 5 + 5?", "previous_response_id": response["id"], **settings}
    kept = httpx.get(f"{stack.url}/v1/responses/{response['id']}", timeout=30).json()
    assert kept["output"] == response["output"]
    assert stack.post("/v1/responses", following).status_code == 200
