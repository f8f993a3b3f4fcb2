"""Training reads conversations as serving writes them."""

import pytest

from kiln_common.text.chat_template import ChatTemplate
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.prompt import PromptRenderer
from kiln_gateway.training.documents import DocumentBuilder, NoAssistantMessage
from tests.support.gateway import write_model_folder

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello there!"}
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(folder):
    return PromptRenderer(ChatTemplate.load(folder), TextTokenizer.load(folder), enable_thinking_default=None)


def learned_text(prompts, document):
    pairs = zip(document.token_ids, document.loss_weights, strict=True)
    return prompts.tokenizer.decode([token_id for token_id, weight in pairs if weight])


def test_an_answers_prompt_is_the_one_serving_would_use(prompts):
    turn = DocumentBuilder(prompts).answer_turn([USER], ANSWER)
    served = prompts.render_chat([USER], tools=None, variables={"enable_thinking": False})
    assert turn.prompt_token_ids == served.token_ids
    assert prompts.tokenizer.decode(turn.completion_token_ids) == "Hello there!<|im_end|>"


def test_an_answer_with_reasoning_follows_an_open_thinking_block(prompts):
    answer = {**ANSWER, "reasoning_content": "Greet."}
    turn = DocumentBuilder(prompts).answer_turn([USER], answer)
    served = prompts.render_chat([USER], tools=None, variables={"enable_thinking": True})
    assert turn.prompt_token_ids == served.token_ids
    assert prompts.tokenizer.decode(turn.completion_token_ids) == "Greet.\n</think>\n\nHello there!<|im_end|>"


def test_every_assistant_token_is_learned_once_and_nothing_else(prompts):
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "Again!"}]
    documents = DocumentBuilder(prompts).assistant_documents(messages, None, 0.5)
    assert [learned_text(prompts, document) for document in documents] == [
        "Hello there!<|im_end|>",
        "Again!<|im_end|>",
    ]
    assert {weight for document in documents for weight in document.loss_weights} == {0.0, 0.5}


def test_turns_share_a_document_where_the_template_leaves_the_past_alone(folder):
    prompts = PromptRenderer(
        ChatTemplate(PLAIN_TEMPLATE), TextTokenizer.load(folder), enable_thinking_default=None
    )
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "Again!"}]
    (document,) = DocumentBuilder(prompts).assistant_documents(messages, None, 1.0)
    assert learned_text(prompts, document) == "Hello there!<|im_end|>Again!<|im_end|>"


def test_a_conversation_without_an_answer_is_refused(prompts):
    with pytest.raises(NoAssistantMessage):
        DocumentBuilder(prompts).assistant_documents([USER], None, 1.0)


def test_training_on_all_weighs_all_but_the_first_token(prompts):
    document = DocumentBuilder(prompts).whole_document([USER, ANSWER], None, 2.0)
    assert document.loss_weights[0] == 0
    assert set(document.loss_weights[1:]) == {2.0}


def test_retokenised_text_stands_as_it_is_after_an_empty_thinking_block(prompts):
    turn = DocumentBuilder(prompts).completion_turn([USER], "  spaced \n")
    assert prompts.tokenizer.decode(turn.prompt_token_ids).endswith("<think>\n\n</think>\n\n")
    assert prompts.tokenizer.decode(turn.completion_token_ids) == "  spaced \n<|im_end|>"
