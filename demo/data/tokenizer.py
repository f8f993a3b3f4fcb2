"""The demo model's tokenizer: byte-level BPE trained on its own text, with Qwen's special tokens.

Digits stay single, so a number is as many tokens as it has figures. Ids are this model's own:
the special tokens come first.
"""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo.data import conversations, words
from demo.data.rendering import TEMPLATE_PATH, render_with_answer

VOCAB_SIZE = 2560
SAMPLE_CONVERSATIONS = 6000
MAX_CONTEXT_TOKENS = 8192

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)  # skipped when text is decoded
MARKUP_TOKENS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# A word with its leading space, one digit, a run of signs, or white space; lines end alone.
_PIECES = r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _sample_text(seed: int) -> list[str]:
    """The text the merges are learned from: seeded conversations and every listed word."""
    rng = random.Random(f"tokenizer:{seed}")
    texts = []
    for _ in range(SAMPLE_CONVERSATIONS):
        drawn = conversations.draw(rng)
        texts.append(
            "".join(render_with_answer(drawn.messages, drawn.answer, drawn.tools, thinking=drawn.thinking))
        )
    texts.extend(f"Hi {name}, to {name}." for name in words.NAMES for _ in range(5))
    texts.extend(f" in {place}" for place in (*words.CITIES, *words.COUNTRIES) for _ in range(5))
    texts.extend(f" a {word}" for word in words.FREE_WORDS for _ in range(5))
    return texts


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """Learn the merges; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*CONTROL_TOKENS, *MARKUP_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_text(seed), trainer)
    return _unmark_markup(tokenizer)


def _unmark_markup(tokenizer: Tokenizer) -> Tokenizer:
    """Keep thinking and tool marks visible in decoded text: only control tokens are skipped."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(content))


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a control or markup token, which every demo tokenizer has."""
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return int(token_id)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template as a checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": token in CONTROL_TOKENS,
        }
        for token in (*CONTROL_TOKENS, *MARKUP_TOKENS)
    }  # fmt: skip
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [TURN_START, TURN_END],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": MAX_CONTEXT_TOKENS,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE_PATH.read_text(encoding="utf-8"), encoding="utf-8")
