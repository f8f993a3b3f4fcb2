"""What an adapter must be like, and which code each flaw answers with."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load as _load
from safetensors.numpy import save

from kiln_common.errors import KilnError
from kiln_registry.domain import AdapterRankTooHigh, BaseModelRecord, ModuleShape
from kiln_registry.inspection import inspect_adapter, parse_peft_config
from tests.support.registry import MODULES, adapter_bytes, lora_tensors, peft_config

BASE = BaseModelRecord("demo", "h", {path: ModuleShape(*sizes) for path, sizes in MODULES.items()})
A_NAME = "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"
B_NAME = "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"


def inspect(tmp_path, content: bytes, config: str | None = None):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    return inspect_adapter(path, parse_peft_config(config or peft_config()), BASE)


def code_of(tmp_path, content: bytes, config: str | None = None) -> str:
    with pytest.raises(KilnError) as caught:
        inspect(tmp_path, content, config)
    assert caught.value.kind.http_status == 400
    assert caught.value.hint
    return caught.value.code


def bf16_file(bits: int) -> bytes:
    """One adapted module in bfloat16, whose A holds `bits` at its end; numpy has no such type."""
    data_a = np.full(16, 0x3F80, np.uint16)
    data_a[-1] = bits
    data_b = np.full(24, 0x3F80, np.uint16)
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            A_NAME: {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
            B_NAME: {"dtype": "BF16", "shape": [12, 2], "data_offsets": [32, 80]},
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + data_a.tobytes() + data_b.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_fitting_adapter_is_described(tmp_path, dtype):
    found = inspect(tmp_path, adapter_bytes(rank=3, dtype=dtype), peft_config(rank=3))
    assert (found.rank, found.alpha) == (3, 6.0)
    assert found.targets == ("down_proj", "gate_proj", "in_proj_qkv")


def test_a_rank_that_fits_no_slot_of_the_engine_is_refused(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(adapter_bytes(rank=3))
    config = parse_peft_config(peft_config(rank=3))
    with pytest.raises(AdapterRankTooHigh, match="rank 3, the engine holds up to 2"):
        inspect_adapter(path, config, replace(BASE, max_adapter_rank=2))
    assert inspect_adapter(path, config, replace(BASE, max_adapter_rank=3)).rank == 3


def test_bfloat16_is_read(tmp_path):
    assert inspect(tmp_path, bf16_file(0x3F80), peft_config(target_modules=["gate_proj"])).targets == (
        "gate_proj",
    )


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])  # inf, -inf, NaN
def test_non_finite_bfloat16_is_refused(tmp_path, bits):
    assert (
        code_of(tmp_path, bf16_file(bits), peft_config(target_modules=["gate_proj"])) == "adapter_not_finite"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_refused(tmp_path, dtype, value):
    tensors = lora_tensors(dtype=dtype)
    tensors[B_NAME][-1, -1] = value
    assert code_of(tmp_path, save(tensors)) == "adapter_not_finite"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused(tmp_path, protocol):
    assert code_of(tmp_path, pickle.dumps({"a": [1.0] * 100}, protocol)) == "pickle_refused"


def test_torch_archives_are_refused(tmp_path):
    assert code_of(tmp_path, b"PK\x03\x04" + bytes(200)) == "pickle_refused"


@pytest.mark.parametrize("cut", [0, 5, 8, 60, 500, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    assert code_of(tmp_path, adapter_bytes()[:cut]) == "invalid_safetensors"


def test_bytes_after_the_tensors_are_refused(tmp_path):
    assert code_of(tmp_path, adapter_bytes() + b"x") == "invalid_safetensors"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 128]},  # says more than there is
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        [],
    ],
)
def test_lying_headers_are_refused(tmp_path, entry):
    header = json.dumps({A_NAME: entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(16)
    assert code_of(tmp_path, content) == "invalid_safetensors"


def test_a_deeply_nested_header_is_refused(tmp_path):
    header = b'{"a":' + b"[" * 50_000
    content = len(header).to_bytes(8, "little") + header
    assert code_of(tmp_path, content) == "invalid_safetensors"


def test_integers_are_refused(tmp_path):
    tensors = {name: tensor.astype(np.int32) for name, tensor in lora_tensors().items()}
    assert code_of(tmp_path, save(tensors)) == "unsupported_dtype"


def test_a_tensor_that_is_not_lora_is_refused(tmp_path):
    tensors = lora_tensors() | {"base_model.model.lm_head.weight": np.ones((2, 2), np.float32)}
    assert code_of(tmp_path, save(tensors)) == "unexpected_tensor"


def test_half_a_module_is_refused(tmp_path):
    tensors = lora_tensors()
    del tensors[B_NAME]
    assert code_of(tmp_path, save(tensors)) == "incomplete_adapter"


def test_an_empty_file_is_refused(tmp_path):
    assert code_of(tmp_path, save({})) == "incomplete_adapter"


def test_a_module_of_another_model_is_refused(tmp_path):
    tensors = {name.replace("layers.0", "layers.7"): t for name, t in lora_tensors().items()}
    assert code_of(tmp_path, save(tensors)) == "adapter_mismatch"


def test_a_shape_of_another_model_is_refused(tmp_path):
    tensors = lora_tensors() | {A_NAME: np.ones((2, 9), np.float32)}
    assert code_of(tmp_path, save(tensors)) == "adapter_mismatch"


def test_a_rank_other_than_the_configs_is_refused(tmp_path):
    assert code_of(tmp_path, adapter_bytes(rank=3), peft_config(rank=2)) == "adapter_rank_mismatch"


def test_a_module_outside_target_modules_is_refused(tmp_path):
    config = peft_config(target_modules=["gate_proj", "down_proj"])
    assert code_of(tmp_path, adapter_bytes(), config) == "invalid_adapter_config"


@pytest.mark.parametrize(
    "feature",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"gate_proj": 4}},
        {"alpha_pattern": {"gate_proj": 4}},
        {"fan_in_fan_out": True},
        {"trainable_token_indices": [1]},
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"init_lora_weights": "pissa"},
        {"something_new": 3},
    ],
)
def test_unsupported_features_are_refused_by_name(feature):
    with pytest.raises(KilnError, match=next(iter(feature))) as caught:
        parse_peft_config(peft_config(**feature))
    assert caught.value.code == "unsupported_adapter_feature"


def test_a_layer_that_the_config_promises_must_be_there(tmp_path):
    tensors = {name: tensor for name, tensor in lora_tensors().items() if "gate_proj" not in name}
    assert code_of(tmp_path, save(tensors)) == "incomplete_adapter"
    found = inspect(tmp_path, save(tensors), peft_config(exclude_modules=["gate_proj"]))
    assert found.targets == ("down_proj", "in_proj_qkv")


def test_names_of_the_multimodal_checkpoint_are_understood(tmp_path):
    renamed = {
        name.replace("model.layers", "model.language_model.layers"): tensor
        for name, tensor in lora_tensors().items()
    }
    assert inspect(tmp_path, save(renamed)).targets == ("down_proj", "gate_proj", "in_proj_qkv")
    assert code_of(tmp_path, save(renamed | lora_tensors())) == "unexpected_tensor"


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        "[]",
        peft_config(r=0),
        peft_config(r=100_000),
        peft_config(r=2.5),
        peft_config(lora_alpha=-1),
        peft_config(lora_alpha=float("nan")),
        peft_config(lora_alpha=None),
        peft_config(target_modules=[]),
        peft_config(target_modules=None),
    ],
)
def test_configs_without_sense_are_refused(config):
    with pytest.raises(KilnError) as caught:
        parse_peft_config(config)
    assert caught.value.code == "invalid_adapter_config"


DRAFTS = {"mtp.fc": (16, 8), "mtp.layers.0.mlp.gate_proj": (8, 12)}
WITH_DRAFTS = replace(BASE, modules=BASE.modules | {p: ModuleShape(*sizes) for p, sizes in DRAFTS.items()})


def with_drafts(*paths: str, rank: int = 2) -> bytes:
    """An adapter on all layers of the main model, and on these of the multi-token prediction."""
    tensors = lora_tensors(rank)
    for path in paths:
        inputs, outputs = DRAFTS[path]
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.ones((rank, inputs), np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.ones((outputs, rank), np.float32)
    return save(tensors)


def inspect_drafts(tmp_path, content: bytes, *targets: str):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    named = ["in_proj_qkv", "gate_proj", "down_proj", *targets]
    return inspect_adapter(path, parse_peft_config(peft_config(target_modules=named)), WITH_DRAFTS)


def test_an_adapter_may_bring_matrices_of_the_layers_that_draft(tmp_path):
    found = inspect_drafts(tmp_path, with_drafts(*DRAFTS), *DRAFTS)
    assert found.targets == ("down_proj", "gate_proj", "in_proj_qkv", "mtp")
    # Names of the main model's layers do not ask for them.
    assert inspect_drafts(tmp_path, with_drafts()).targets == ("down_proj", "gate_proj", "in_proj_qkv")


def test_some_of_the_layers_that_draft_are_refused(tmp_path):
    with pytest.raises(
        KilnError, match=r"adapts 1 of 2 layers .* not 'mtp.layers.0.mlp.gate_proj'"
    ) as caught:
        inspect_drafts(tmp_path, with_drafts("mtp.fc"), *DRAFTS)
    assert caught.value.code == "incomplete_adapter"
    only = save({name: value for name, value in _load(with_drafts(*DRAFTS)).items() if ".mtp." in name})
    with pytest.raises(KilnError, match="no tensors for the main model"):
        inspect_drafts(tmp_path, only, *DRAFTS)
