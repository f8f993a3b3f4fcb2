"""`kiln quantize`: from a checkpoint and a text to a folder, in a process of its own."""

import json

import pytest

from kiln_cli.quantize.calibration import MAX_DOCUMENT_TOKENS, check_length, read_documents
from kiln_common.text.tokenizer import TextTokenizer
from kiln_nn.weights import load_checkpoint
from tests.support.command import Command
from tests.support.gateway import REPOSITORY

MODEL = REPOSITORY / "demo" / "model"


@pytest.fixture
def run(capsys):
    return Command(capsys)


@pytest.fixture
def conversations(tmp_path):
    rows = [
        {"prompt": "Who are you?", "completion": "I am a small model."},
        {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]},
        {"text": "Hello Maria, thank you for your email."},
    ]
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def book(tmp_path):
    """Longer than a sequence, shorter than what is recommended."""
    path = tmp_path / "book.txt"
    path.write_text("Hello Maria, thank you for your email. " * 400)
    return path


def test_with_a_text_it_is_calibrated_and_the_folder_is_served(run, book, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "quantised"
    ran = run("quantize", str(MODEL), "--calibration", str(book), "--out", str(out), "--json")
    assert ran.exit_code == 0, ran.err
    assert 2048 <= ran.json["calibration_tokens"] < ran.json["recommended_calibration_tokens"] == 32_768
    assert (ran.json["scheme"], ran.json["method"], ran.json["folder"]) == ("int4", "gptq", str(out))
    assert ran.json["quantized_layers"] == 5 * 3 + 4 + 6 * 3
    assert "lm_head" in ran.json["plain_modules"]
    loaded = load_checkpoint(out)
    assert loaded.scheme == "int4"
    assert ran.json["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors")) - _headers(out)
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # nobody reads one file and not another

    for copied in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / copied).read_bytes() == (MODEL / copied).read_bytes()

    again = run("quantize", str(MODEL), "--out", str(out))
    assert again.exit_code == 2
    assert "invalid_quantization" in again.err
    assert "is not empty" in again.err
    assert "Name a folder with --out" in again.err
    refused = run("quantize", str(out), "--out", str(tmp_path / "again"))
    assert "is quantised already" in refused.err
    assert "It can be served as it is" in refused.err


@pytest.mark.parametrize("read_at_most", [[], ["--max-tokens", "2047"]])
def test_a_text_shorter_than_a_sequence_is_refused_with_its_numbers(
    run, conversations, book, tmp_path, read_at_most
):
    text = book if read_at_most else conversations
    out = tmp_path / "out"
    ran = run("quantize", str(MODEL), "--calibration", str(text), *read_at_most, "--out", str(out))
    assert ran.exit_code == 2
    assert "calibration_too_short" in ran.err
    assert "GPTQ needs 2,048, and 32,768 or more" in ran.err
    assert "--method rtn" in ran.err
    assert not out.exists()


def test_a_text_that_is_short_is_taken_with_a_word():
    assert "has 2,048 tokens, 32,768 or more are recommended" in (check_length(2048) or "")
    assert check_length(32_768) is None


def _headers(folder) -> int:
    """Bytes of the files that are no tensors: an eight-byte length, and as many of JSON."""
    lengths = [int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors")]
    return sum(8 + length for length in lengths)


def test_a_process_that_breaks_down_says_its_last_words(run, tmp_path):
    (tmp_path / "file").touch()
    ran = run("quantize", str(MODEL), "--out", str(tmp_path / "file" / "out"), "--json")
    assert ran.exit_code == 2
    assert ran.json["error"]["code"] == "quantizing_failed"
    assert str(tmp_path / "file") in ran.json["error"]["message"]


def test_a_device_that_there_is_not_is_refused_before_anything_is_read(run, tmp_path):
    ran = run(
        "quantize", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--device", "gpu", "--json"
    )
    assert (ran.exit_code, ran.json["error"]["code"]) == (2, "wrong_usage")
    assert "'cuda'" in ran.json["error"]["message"]


def test_documents_are_rendered_as_the_model_reads_them(conversations):
    documents = read_documents(conversations, MODEL, 1000)
    text = [TextTokenizer.load(MODEL).decode(ids) for ids in documents]
    assert text[0].startswith("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant")
    assert "I am a small model.<|im_end|>" in text[0]
    assert "2 + 3" in text[1]
    assert text[2] == "Hello Maria, thank you for your email."
    assert sum(map(len, read_documents(conversations, MODEL, 20))) == 20


def test_plain_text_is_cut_into_documents(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time. " * 2000)
    documents = read_documents(path, MODEL, 5000)
    assert [len(ids) for ids in documents] == [MAX_DOCUMENT_TOKENS, MAX_DOCUMENT_TOKENS, 904]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("none.txt", None, "file_unreadable"),
        ("none.jsonl", None, "file_unreadable"),
        ("broken.jsonl", "{", "invalid_jsonl"),
        ("other.jsonl", '{"reward": 1}', "invalid_jsonl"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_before_anything_runs(run, tmp_path, name, content, code):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    ran = run("quantize", str(MODEL), "--calibration", str(path), "--out", str(tmp_path / "out"), "--json")
    assert ran.exit_code == 2
    assert ran.json["error"]["code"] == code
    assert not (tmp_path / "out").exists()
