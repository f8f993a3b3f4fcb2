"""Checkpoints that others have quantised: read to the number, or refused by name."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from kiln_nn.errors import CheckpointMismatch, InvalidQuantization, UnsupportedQuantization
from kiln_nn.kernels.quantised import QuantisedMatrix, quantise_rtn
from kiln_nn.weights import load_checkpoint
from tests.support import quantised_checkpoints as others

GATE = "model.layers.0.mlp.gate_proj"
WEIGHTS = "model.safetensors"


def half_scales(weight_OI):
    return others.compressed_int4(weight_OI, torch.float16)


def newer_gptq(weight_OI):
    return others.gptq(weight_OI, zero=8)


def symmetric_awq(weight_OI):
    return others.awq(weight_OI, is_symmetric=True)


FORMATS = {
    "compressed int4": (others.COMPRESSED_INT4, others.compressed_int4, "int4"),
    "compressed int4, half scales": (others.COMPRESSED_INT4, half_scales, "int4"),
    "compressed fp8": (others.COMPRESSED_FP8, others.compressed_fp8, "fp8"),
    "gptq": (others.GPTQ, others.gptq, "int4"),
    "gptq v2": (others.GPTQ | {"checkpoint_format": "gptq_v2"}, newer_gptq, "int4"),
    "symmetric awq": (others.AWQ | {"zero_point": False}, symmetric_awq, "int4"),
    "awq": (others.AWQ | {"zero_point": True}, others.awq, None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_they_were_packed_from(tmp_path, name):
    config, pack, scheme = FORMATS[name]
    expected = others.write_quantised(tmp_path, config, pack)
    loaded = load_checkpoint(tmp_path)
    views = loaded.arena.views()
    assert loaded.scheme == scheme
    for path, weight in expected.items():
        view = views[path]
        assert isinstance(view, QuantisedMatrix) == (scheme is not None)
        found = view.dequantise(torch.float32) if isinstance(view, QuantisedMatrix) else view
        # The numbers and scales are the same, so the weights are, to the last bit of a product.
        assert torch.allclose(found, weight, rtol=1e-6, atol=0), path
    assert loaded.arena.num_foreign_bytes(views) == 0


def test_the_multimodal_form_is_read_too(tmp_path):
    expected = others.write_quantised(tmp_path, others.GPTQ, others.gptq, nested=True, with_vision=True)
    view = load_checkpoint(tmp_path).arena.views()[f"{GATE}.weight"]
    assert torch.allclose(view.dequantise(torch.float32), expected[f"{GATE}.weight"], rtol=1e-6, atol=0)


def test_zero_points_can_be_rounded_away_on_request(tmp_path):
    expected = others.write_quantised(tmp_path, others.AWQ, others.awq)
    loaded = load_checkpoint(tmp_path, quantization="fp8")
    assert loaded.scheme == "fp8"
    found = loaded.arena.views()[f"{GATE}.weight"].dequantise(torch.float32)
    assert (found - expected[f"{GATE}.weight"]).norm() < 0.04 * found.norm()


def test_zero_points_are_rounded_away_under_the_scales_that_are_kept(tmp_path):
    expected = others.write_quantised(tmp_path, others.AWQ, others.awq)
    view = load_checkpoint(tmp_path, quantization="int4").arena.views()[f"{GATE}.weight"]
    rounded = quantise_rtn(expected[f"{GATE}.weight"].half(), "int4")
    assert torch.equal(view.scales, rounded.scales)
    assert torch.equal(view.numbers(), rounded.numbers())


def test_small_layers_that_came_quantised_are_held_plain(tmp_path):
    others.write_quantised(tmp_path, others.COMPRESSED_FP8, others.compressed_fp8)
    tensors = load_file(tmp_path / WEIGHTS)
    path = "model.layers.0.linear_attn.in_proj_a"
    parts, expected = others.compressed_fp8(tensors.pop(f"{path}.weight").float().numpy())
    save_file(tensors | {f"{path}.{part}": value for part, value in parts.items()}, tmp_path / WEIGHTS)
    view = load_checkpoint(tmp_path).arena.views()[f"{path}.weight"]
    assert torch.allclose(view, torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_hash_is_of_what_is_stored(tmp_path):
    others.write_quantised(tmp_path / "a", others.GPTQ, others.gptq)
    others.write_quantised(tmp_path / "b", others.GPTQ, others.gptq, nested=True)
    first, second = (load_checkpoint(tmp_path / name).manifest.model_hash for name in "ab")
    assert first == second
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors[f"{GATE}.scales"][0, 0] *= 2
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    assert load_checkpoint(tmp_path / "a").manifest.model_hash != first


def changed(config, path, value):
    """A copy of the configuration with one field, named by its path, changed."""
    config = deepcopy(config)
    *way, field = path.split(".")
    inner = config
    for step in way:
        inner = inner.setdefault(step, {})
    inner[field] = value
    return config


WEIGHTS_OF_GROUP = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("base", "path", "value", "said"),
    [
        (others.GPTQ, "quant_method", "bitsandbytes", "quant_method 'bitsandbytes'"),
        (others.GPTQ, "bits", 8, "bits is 8"),
        (others.GPTQ, "group_size", 32, "group_size is 32"),
        (others.GPTQ, "sym", False, "sym is False"),
        (others.GPTQ, "desc_act", True, "desc_act is True"),
        (others.GPTQ, "checkpoint_format", "marlin", "checkpoint_format 'marlin'"),
        (others.GPTQ, "dynamic", {"+:.*mlp.*": {"bits": 8}}, r"form of their own \(\+:"),
        (others.AWQ, "version", "gemv", "version is 'gemv'"),
        (others.COMPRESSED_INT4, "format", "marlin-24", "format 'marlin-24'"),
        (others.COMPRESSED_INT4, "quantization_status", "frozen", "quantization_status is 'frozen'"),
        (others.COMPRESSED_INT4, f"{WEIGHTS_OF_GROUP}.symmetric", False, "symmetric is False"),
        (others.COMPRESSED_INT4, f"{WEIGHTS_OF_GROUP}.group_size", 64, "group_size is 64"),
        (others.COMPRESSED_INT4, f"{WEIGHTS_OF_GROUP}.actorder", "group", "actorder"),
        (others.COMPRESSED_FP8, f"{WEIGHTS_OF_GROUP}.strategy", "block", "strategy is 'block'"),
        (others.COMPRESSED_FP8, "config_groups.group_0.input_activations.dynamic", False, "dynamic is False"),
        (others.COMPRESSED_FP8, "config_groups", {}, "0 schemes"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, base, path, value, said):
    others.write_quantised(tmp_path, others.GPTQ, others.gptq)
    others.edit_config(tmp_path, quantization_config=changed(base, path, value))
    with pytest.raises(UnsupportedQuantization, match=said):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "part", "change", "said"),
    [
        ("gptq", "g_idx", lambda t: t.flip(0), "g_idx is not in order"),
        ("gptq", "qzeros", lambda t: t + 1, "zero points are not all in the middle"),
        ("symmetric awq", "qzeros", lambda t: t + 1, "zero points differ from 8"),
    ],
)
def test_values_that_contradict_the_configuration_are_refused(tmp_path, name, part, change, said):
    config, pack, _ = FORMATS[name]
    others.write_quantised(tmp_path, config, pack)
    tensors = load_file(tmp_path / WEIGHTS)
    # Whole groups in reverse order, or another zero point, in the one layer that has two groups.
    path = "model.layers.0.mlp.down_proj"
    tensors[f"{path}.{part}"] = change(tensors[f"{path}.{part}"]).contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedQuantization, match=f"{path}.*{said}"):
        load_checkpoint(tmp_path)


def test_a_missing_part_and_a_wrong_shape_are_named(tmp_path):
    others.write_quantised(tmp_path, others.GPTQ, others.gptq)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != f"{GATE}.scales"}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointMismatch, match=rf"lacks {GATE}\.scales"):
        load_checkpoint(tmp_path)
    save_file(tensors | {f"{GATE}.qweight": tensors[f"{GATE}.qweight"][:8].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointMismatch, match=rf"{GATE}\.scales is \[1, 256\] instead of \[0, 256\]"):
        load_checkpoint(tmp_path)
    broken = tensors | {f"{GATE}.scales": tensors[f"{GATE}.scales"][:, :8].clone()}
    save_file(broken, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointMismatch, match=rf"{GATE}\.scales is \[1, 8\] instead of \[1, 256\]"):
        load_checkpoint(tmp_path)


def test_two_quantisations_are_one_too_many(tmp_path):
    others.write_quantised(tmp_path, others.COMPRESSED_INT4, others.compressed_int4)
    assert load_checkpoint(tmp_path, quantization="int4").scheme == "int4"
    with pytest.raises(InvalidQuantization, match="int4 already"):
        load_checkpoint(tmp_path, quantization="fp8")


def test_quantised_tensors_without_a_word_in_the_configuration_do_not_fit(tmp_path):
    others.write_quantised(tmp_path, others.GPTQ, others.gptq)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match=r"missing: .*unexpected: .*g_idx"):
        load_checkpoint(tmp_path)
