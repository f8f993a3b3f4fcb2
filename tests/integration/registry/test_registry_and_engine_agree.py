"""What the registry lets through, kiln_nn can load, and what kiln_nn writes, the registry takes."""

import json

import pytest

from kiln_common.errors import KilnError
from kiln_nn.errors import KilnNnError
from kiln_nn.lora import LoraSpec, write_adapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.lora.peft_config import parse_config
from kiln_nn.lora.spec import adapter_table, mtp_table
from kiln_registry.domain import BaseModelRecord, ModuleShape
from kiln_registry.inspection import inspect_adapter, parse_peft_config
from kiln_registry.plain_form import plain_config
from tests.support.registry import peft_config
from tests.support.tiny_models import tiny_config


@pytest.mark.parametrize("targets", ["all", "attention", "mlp", ("q_proj", "in_proj_a")])
@pytest.mark.parametrize("with_mtp", [False, True])
def test_a_trained_adapter_passes_the_registrys_check(tmp_path, targets, with_mtp):
    config = tiny_config()
    spec = LoraSpec(3, 6.0, targets, with_mtp)
    lora = LoraParameters.create(config, spec, seed=0, device="cpu")
    write_adapter(tmp_path, lora.tensors(), lora.spec, "tiny/model")
    layers = adapter_table(config) | mtp_table(config)
    modules = {path: ModuleShape(*sizes) for path, sizes in layers.items()}
    found = inspect_adapter(
        tmp_path / "adapter_model.safetensors",
        parse_peft_config((tmp_path / "adapter_config.json").read_text()),
        BaseModelRecord("tiny", "h", modules),
    )
    assert (found.rank, found.alpha) == (3, 6.0)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": "0.21"},
        {"init_lora_weights": "gaussian", "rank_pattern": {}, "modules_to_save": None},
        {"layers_to_transform": [0]},
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"rank_pattern": {"a": 1}},
        {"init_lora_weights": "pissa"},
        {"task_type": "SEQ_CLS"},
        {"future_feature": [1]},
        {"peft_type": "IA3"},
        {"r": 0},
        {"r": True},
        {"lora_alpha": 0},
        {"target_modules": None},
    ],
)
def test_both_give_the_same_verdict_on_a_config(overrides):
    text = peft_config(**overrides)

    def accepts(parse) -> bool:
        try:
            parse(text)
        except (KilnError, KilnNnError):
            return False
        return True

    assert accepts(parse_peft_config) == accepts(parse_config), json.dumps(overrides)


@pytest.mark.parametrize(
    "overrides",
    [{"use_rslora": True}, {"rank_pattern": {"a": 1}}, {"use_rslora": True, "alpha_pattern": {"a": 2.5}}],
)
def test_a_config_in_plain_form_is_one_that_both_take(overrides):
    text = plain_config(peft_config(**overrides))
    assert parse_peft_config(text).rank == parse_config(text).rank == 2
