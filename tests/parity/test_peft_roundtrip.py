"""Adapters travel between Kiln and `peft` in both directions without changing what they compute.

Tolerance: both sides run the same float32 products on the same shapes, so logits agree to
rounding (1e-5 relative to their largest).
"""

import pytest
import torch

from kiln_nn.config import ModelConfig
from kiln_nn.lora import LoraSpec, adapter_table, lora_shapes, read_adapter, write_adapter
from tests.support.tiny_models import SHAPES, hf_model, make_checkpoint, random_adapter

peft = pytest.importorskip("peft")
RTOL = 1e-5
TOKENS = torch.arange(7, 31)[None]


def _logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def _merge_by_hand(model, tensors, scaling):
    """Add B·A·scaling to the plain model's matrices: what an adapter means, without peft."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for path, (a, b) in tensors.items():
            modules[path].weight += scaling * (b @ a)


@pytest.mark.parametrize("shape", ["tied", "deltanet_16_32"])
@pytest.mark.parametrize("targets", ["all", "attention", "mlp", ("in_proj_b", "o_proj")])
def test_peft_loads_what_kiln_writes(tmp_path, shape, targets):
    config = make_checkpoint(tmp_path / "model", **SHAPES[shape])
    spec = LoraSpec(rank=3, alpha=12.0, targets=targets)
    tensors = random_adapter(config, spec, seed=1)
    write_adapter(tmp_path / "adapter", tensors, spec, "kiln/tiny")

    wrapped = peft.PeftModel.from_pretrained(hf_model(tmp_path / "model"), tmp_path / "adapter").eval()
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == lora_shapes(config, spec).keys()

    plain = hf_model(tmp_path / "model")
    base_logits = _logits(plain)
    _merge_by_hand(plain, tensors, spec.scaling)
    expected = _logits(plain)
    assert (expected - base_logits).abs().max() > 0.01 * expected.abs().max()
    assert (_logits(wrapped) - expected).abs().max() <= RTOL * expected.abs().max()


@pytest.mark.parametrize("targets", ["all", "mlp", ("q_proj", "in_proj_qkv")])
def test_kiln_reads_what_peft_writes(tmp_path, targets):
    config = make_checkpoint(tmp_path / "model")
    spec = LoraSpec(rank=4, alpha=8.0, targets=targets)
    wrapped = peft.get_peft_model(
        hf_model(tmp_path / "model"),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(spec.target_names),
            lora_dropout=0.1,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    wrapped.save_pretrained(tmp_path / "adapter")

    adapter = read_adapter(tmp_path / "adapter", config)
    assert set(adapter.spec.target_names) == set(spec.target_names)
    assert adapter.spec.scaling == spec.scaling
    assert adapter.tensors.keys() == lora_shapes(config, spec).keys()
    state = wrapped.state_dict()
    for path, (a, b) in adapter.tensors.items():
        assert torch.equal(a, state[f"base_model.model.{path}.lora_A.default.weight"])
        assert torch.equal(b, state[f"base_model.model.{path}.lora_B.default.weight"])


def test_peft_layer_subset_is_read_as_it_is(tmp_path):
    config = make_checkpoint(tmp_path / "model")
    wrapped = peft.get_peft_model(
        hf_model(tmp_path / "model"),
        peft.LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1, 3], task_type="CAUSAL_LM"),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", config)
    assert list(adapter.tensors) == ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    assert adapter.spec.targets == ("down_proj",)


def test_adaptable_layers_are_transformers_linear_layers(tmp_path):
    config: ModelConfig = make_checkpoint(tmp_path, **SHAPES["deltanet_16_16"])
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in hf_model(tmp_path).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert adapter_table(config) == linears


def test_peft_passes_over_what_is_for_the_mtp_layer_and_gives_the_rest_back(tmp_path):
    """transformers leaves that layer out of its model, and PEFT finds nothing to adapt there."""
    config = make_checkpoint(tmp_path / "model")
    spec = LoraSpec(rank=3, alpha=12.0, targets="attention", with_mtp=True)
    tensors = random_adapter(config, spec, seed=1)
    write_adapter(tmp_path / "adapter", tensors, spec, "kiln/tiny")
    main = {path: pair for path, pair in tensors.items() if not path.startswith("mtp.")}
    wrapped = peft.PeftModel.from_pretrained(hf_model(tmp_path / "model"), tmp_path / "adapter").eval()
    plain = hf_model(tmp_path / "model")
    _merge_by_hand(plain, main, spec.scaling)
    expected = _logits(plain)
    assert (_logits(wrapped) - expected).abs().max() <= RTOL * expected.abs().max()
    wrapped.save_pretrained(tmp_path / "again")
    back = read_adapter(tmp_path / "again", config)
    assert back.spec == LoraSpec(rank=3, alpha=12.0, targets="attention")
    assert back.tensors.keys() == main.keys()
