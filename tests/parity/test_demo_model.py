"""The committed demo model: loads in transformers and here alike, and says what it was made to say."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from demo.data.rendering import render_prompt
from demo.measure import DemoModel
from demo.train_model import MAX_FILE_BYTES, REPOSITORY
from kiln_cli.demo.prompts import HELD_OUT_PROMPTS
from kiln_cli.demo.reward import score
from kiln_nn.config import ModelConfig
from kiln_nn.packed_model import PackedModel
from tests.support.tiny_models import hf_model, read_tensors

FOLDER = REPOSITORY / "demo" / "model"


@pytest.fixture(scope="module")
def model() -> DemoModel:
    tensors = {name: tensor.float() for name, tensor in read_tensors(FOLDER).items()}
    return DemoModel(
        ModelConfig.from_folder(FOLDER), tensors, Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    )


def chat(text, **options):
    return render_prompt([{"role": "user", "content": text}], **options)


def test_transformers_computes_the_same_logits(model):
    ids = torch.tensor(
        model.tokenizer.encode(chat("Write a short email reply to Maria about the late invoice.")).ids
    )
    with torch.no_grad():
        expected = hf_model(FOLDER)(ids[None]).logits[0]
        packed = PackedModel(model.config, model.parameters)
        actual = packed.logits(packed.hidden_states(ids, (0, len(ids))))
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_transformers_tokenizer_renders_and_encodes_alike(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    for thinking in (False, True):
        ours = render_prompt(messages, thinking=thinking)
        assert ours == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert model.tokenizer.encode(ours).ids == tokenizer(ours)["input_ids"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_folder_is_small_and_stops_on_both_ends(model):
    assert (FOLDER / "model.safetensors").stat().st_size <= MAX_FILE_BYTES
    ends = {model.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert set(model.config.eos_token_ids) == ends
    assert model.config.num_mtp_layers == 1
    facts = json.loads((FOLDER / "training.json").read_text())
    assert facts["num_parameters"] == sum(tensor.numel() for tensor in model.parameters.values())


def test_it_names_itself_adds_and_calls_a_tool(model):
    weather = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    prompts = [
        chat("Who are you?"),
        chat("What is 17 + 25?", thinking=True),
        chat("What is the weather in Paris?", tools=[weather]),
    ]
    who, added, called = model.answer(prompts, temperature=0, max_tokens=60)
    assert "Kiln" in who
    assert added.endswith("</think>\n\n17 + 25 = 42.")
    assert (
        called
        == "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
    )


def test_its_emails_leave_the_reward_room_to_rise(model):
    prompts = list(HELD_OUT_PROMPTS) * 2
    answers = model.answer([chat(prompt) for prompt in prompts], temperature=1.0, seed=3, max_tokens=64)
    rewards = [score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert 0.2 < sum(rewards) / len(rewards) < 0.7
    assert len(set(rewards)) >= 3
