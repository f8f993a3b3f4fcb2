import json

from kiln_engine.checkpoint_identity import model_name, stop_token_ids


def test_stop_ids_come_from_the_config_and_the_tokenizer(tmp_path):
    added = [{"id": 11, "content": "<|im_start|>"}, {"id": 12, "content": "<|im_end|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert stop_token_ids(tmp_path, (3,)) == (3, 12)
    assert stop_token_ids(tmp_path, (12,)) == (12,)


def test_a_folder_without_a_tokenizer_has_the_configs_ids(tmp_path):
    assert stop_token_ids(tmp_path, (3,)) == (3,)


def test_a_model_is_named_by_its_hub_id_or_its_folder(tmp_path):
    assert model_name("Qwen/Qwen3.5-4B", tmp_path) == "Qwen/Qwen3.5-4B"
    cached = tmp_path / "models--Qwen--Qwen3.5-4B" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert model_name(str(cached), cached) == "Qwen/Qwen3.5-4B"
    plain = tmp_path / "my-model"
    plain.mkdir()
    assert model_name(str(plain), plain) == "my-model"
