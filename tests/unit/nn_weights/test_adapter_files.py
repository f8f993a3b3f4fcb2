"""Adapter files: what is written reads back, and what does not fit is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from kiln_nn.errors import InvalidAdapter, InvalidLoraSpec, UnsafeCheckpoint, UnsupportedAdapter
from kiln_nn.lora import (
    LORA_TARGETS,
    LoraSpec,
    adapter_table,
    lora_shapes,
    mtp_table,
    parse_adapter,
    read_adapter,
    serialize_adapter,
    write_adapter,
)
from tests.support.tiny_models import random_adapter, tiny_config

CONFIG = tiny_config()
SPEC = LoraSpec(rank=4, alpha=8.0)
DOWN = "model.layers.0.mlp.down_proj"
KEY = f"base_model.model.{DOWN}.lora_A.weight"


@pytest.fixture(scope="module")
def files():
    return serialize_adapter(random_adapter(CONFIG, SPEC), SPEC, "kiln/tiny")


def with_fields(config_text, **fields):
    return json.dumps(json.loads(config_text) | fields)


def with_tensors(weights, change):
    tensors = load(weights)
    change(tensors)
    return save(tensors)


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(x, y) for path in left for x, y in zip(left[path], right[path], strict=True)
    )


@pytest.mark.parametrize("targets", ["all", "attention", "mlp", ("in_proj_a", "o_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_round_trip(tmp_path, targets, dtype):
    spec = LoraSpec(rank=3, alpha=4.5, targets=targets)
    tensors = {path: (a.to(dtype), b.to(dtype)) for path, (a, b) in random_adapter(CONFIG, spec).items()}
    write_adapter(tmp_path / "adapter", tensors, spec, "kiln/tiny")
    adapter = read_adapter(tmp_path / "adapter", CONFIG)
    assert adapter.spec == spec
    assert adapter.base_model_name == "kiln/tiny"
    assert same(adapter.tensors, tensors)


def test_same_adapter_is_the_same_bytes(files):
    tensors = random_adapter(CONFIG, SPEC)
    assert serialize_adapter(dict(reversed(tensors.items())), SPEC, "kiln/tiny") == files


def test_multimodal_names_are_mapped(files):
    config_text, weights = files
    nested = {
        key.replace("model.layers", "model.language_model.layers"): t for key, t in load(weights).items()
    }
    assert same(parse_adapter(config_text, save(nested), CONFIG).tensors, random_adapter(CONFIG, SPEC))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(KEY), rf"{DOWN} lacks its lora_A"),
        (lambda t: t.update({KEY: t[KEY][:, 1:].contiguous()}), r"\[4, 63\] instead of \[4, 64\]"),
        (lambda t: t.update({KEY: t[KEY][1:].contiguous()}), r"\[3, 64\] instead of \[4, 64\]"),
        (lambda t: t[KEY][0, 0].fill_(float("nan")), rf"{DOWN}\.lora_A holds NaN"),
        (lambda t: t[KEY][0, 0].fill_(float("inf")), "infinity"),
        (lambda t: t.update({KEY: t[KEY].to(torch.int32)}), "I32"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 48)}), "lm_head"),
        (lambda t: t.update({KEY.replace("layers.0", "layers.4"): t[KEY].clone()}), r"layers\.4"),
        (lambda t: t.update({"stray": torch.ones(1)}), "stray"),
        (lambda t: [t.pop(k) for k in list(t) if DOWN in k], rf"without tensors: {DOWN}"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_wrong_tensors_are_named(files, change, said):
    config_text, weights = files
    with pytest.raises(InvalidAdapter, match=said):
        parse_adapter(config_text, with_tensors(weights, change), CONFIG)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 8}},
        {"alpha_pattern": {"down_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"some_later_feature": {"on": 1}},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"task_type": "SEQ_CLS"},
    ],
)
def test_features_beyond_plain_lora_are_named(files, fields):
    config_text, weights = files
    with pytest.raises(UnsupportedAdapter, match=next(iter(fields))):
        parse_adapter(with_fields(config_text, **fields), weights, CONFIG)


def test_dora_tensors_are_recognised(files):
    config_text, weights = files
    key = f"base_model.model.{DOWN}.lora_magnitude_vector"
    with pytest.raises(UnsupportedAdapter, match="DoRA"):
        parse_adapter(config_text, with_tensors(weights, lambda t: t.update({key: torch.ones(48)})), CONFIG)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 8}, "instead of"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
    ],
)
def test_impossible_fields_are_named(files, fields, said):
    config_text, weights = files
    with pytest.raises(InvalidAdapter, match=said):
        parse_adapter(with_fields(config_text, **fields), weights, CONFIG)


@pytest.mark.parametrize("config_text", ["", "[]", "{", b"\xff\xfe"])
def test_broken_config_is_refused(files, config_text):
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        parse_adapter(config_text, files[1], CONFIG)


@pytest.mark.parametrize("weights", [b"", b"\x80\x04\x95pickle", b"\xff" * 64])
def test_what_is_not_safetensors_is_refused(files, weights):
    with pytest.raises(InvalidAdapter, match="not a safetensors file"):
        parse_adapter(files[0], weights, CONFIG)


def test_pickled_and_absent_adapters_are_told_apart(tmp_path, files):
    (tmp_path / "adapter_config.json").write_text(files[0])
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeCheckpoint, match=r"adapter_model\.bin"):
        read_adapter(tmp_path, CONFIG)


def test_adapter_for_another_model_is_refused(files):
    with pytest.raises(InvalidAdapter, match="instead of"):
        parse_adapter(*files, tiny_config(hidden_size=64))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "no tensors"),
        ({DOWN: (torch.zeros(5, 64), torch.zeros(48, 4))}, "not of rank 4"),
        ({DOWN: (torch.zeros(4, 64), torch.full((48, 4), float("nan")))}, "NaN"),
    ],
)
def test_unsound_adapters_are_not_written(tmp_path, tensors, said):
    with pytest.raises(InvalidAdapter, match=said):
        write_adapter(tmp_path / "adapter", tensors, SPEC, "kiln/tiny")
    assert not (tmp_path / "adapter").exists()


def test_groups_partition_what_can_be_adapted():
    attention, mlp = (set(lora_shapes(CONFIG, LoraSpec(1, 1.0, group))) for group in ("attention", "mlp"))
    assert attention | mlp == set(adapter_table(CONFIG))
    assert not attention & mlp
    for index, kind in enumerate(CONFIG.layer_types):
        own = {path.rpartition(".")[2] for path in adapter_table(CONFIG) if f".layers.{index}." in path}
        assert own == set(LORA_TARGETS[kind])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"targets": ("q_proj", "lm_head")}, "lm_head"),
        ({"targets": ()}, "nothing"),
        ({"targets": "everything"}, "everything"),
    ],
)
def test_senseless_specs_are_refused(fields, said):
    with pytest.raises(InvalidLoraSpec, match=said):
        LoraSpec(**{"rank": 4, "alpha": 8.0, **fields})


def test_targets_must_exist_in_the_model():
    with pytest.raises(InvalidLoraSpec, match="none of them exists"):
        lora_shapes(tiny_config(layer_types=("linear_attention",)), LoraSpec(4, 8.0, ("q_proj",)))


WITH_MTP = LoraSpec(rank=4, alpha=8.0, targets="attention", with_mtp=True)


def test_matrices_of_the_mtp_layer_travel_with_the_others(tmp_path):
    tensors = random_adapter(CONFIG, WITH_MTP)
    assert set(mtp_table(CONFIG)) == {path for path in tensors if path.startswith("mtp.")}
    assert {"mtp.fc", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.down_proj"} <= tensors.keys()
    write_adapter(tmp_path, tensors, WITH_MTP, "kiln/tiny")
    adapter = read_adapter(tmp_path, CONFIG)
    assert adapter.spec == WITH_MTP
    assert same(adapter.tensors, tensors)
    # PEFT matches names by their ends: the main model's must not claim the layer's, nor the other way round.
    named = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert "mtp.fc" in named
    assert "q_proj" in named
    assert "down_proj" not in named
    assert {name for name in named if name.startswith("mtp.")} == set(mtp_table(CONFIG))


def test_an_adapter_of_the_main_model_draws_what_it_drew_without_the_mtp_layer():
    plain, both = random_adapter(CONFIG, replace(WITH_MTP, with_mtp=False)), random_adapter(CONFIG, WITH_MTP)
    assert same(plain, {path: both[path] for path in plain})


@pytest.mark.parametrize(
    ("keeps", "said"),
    [
        (lambda path: path != "mtp.fc", "lacks layers of the multi-token prediction: mtp.fc"),
        (lambda path: path.startswith("mtp."), "no tensors of the main model"),
    ],
)
def test_parts_of_an_mtp_layer_are_refused(keeps, said):
    tensors = {path: pair for path, pair in random_adapter(CONFIG, WITH_MTP).items() if keeps(path)}
    with pytest.raises(InvalidAdapter, match=said):
        parse_adapter(*serialize_adapter(tensors, WITH_MTP, "kiln/tiny"), CONFIG)


def test_a_model_without_an_mtp_layer_refuses_its_matrices():
    files = serialize_adapter(random_adapter(CONFIG, WITH_MTP), WITH_MTP, "kiln/tiny")
    with pytest.raises(InvalidAdapter, match=r"mtp\.fc"):
        parse_adapter(*files, tiny_config(num_mtp_layers=0))
    with pytest.raises(InvalidLoraSpec, match="no multi-token-prediction layer"):
        lora_shapes(tiny_config(num_mtp_layers=0), WITH_MTP)
