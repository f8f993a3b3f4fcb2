"""Checkpoints quantised here, in transformers and in our own hands."""

import json

import pytest
import torch

from kiln_nn.errors import InvalidQuantization
from kiln_nn.packed_model import PackedModel
from kiln_nn.quantise import quantise_checkpoint
from kiln_nn.weights import load_checkpoint
from tests.support.tiny_models import WHOLE_GROUPS, make_checkpoint, read_tensors

WAYS = [("fp8", "rtn"), ("int4", "rtn"), ("int4", "gptq")]
IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def one_thread():
    """More of them wait for each other over matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documents(seed: int = 0, count: int = 24) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (64,), generator=draw).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    # One layer whose inputs are no whole groups, and one tensor that is no linear layer's.
    make_checkpoint(folder, dtype=torch.bfloat16, **WHOLE_GROUPS | {"intermediate_size": 192})
    (folder / "chat_template.jinja").write_text("a template")
    return folder


def logits(folder, **loading):
    loaded = load_checkpoint(folder, **loading)
    model = PackedModel(loaded.config, loaded.arena.views())
    with torch.no_grad():
        return model.logits(model.hidden_states(IDS, (0, len(IDS))))


@pytest.mark.parametrize(("scheme", "method"), WAYS)
def test_transformers_loads_the_folder_and_gives_the_same_logits(plain, tmp_path, scheme, method):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    seen = []
    folder = quantise_checkpoint(
        plain, out, scheme, method, documents(), progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(done, 4) for done in range(1, 5)]
    assert folder.num_quantised == (21 if scheme == "int4" else 25)
    model, loading = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        expected = model.eval()(IDS[None]).logits[0]
    found = logits(out)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # It is another model than the plain one: nothing was dequantised from somewhere else.
    assert (found - logits(plain)).abs().max() > 1e-3 * expected.abs().max()


def test_rounding_ahead_is_rounding_at_load(plain, tmp_path):
    quantise_checkpoint(plain, tmp_path / "out", "int4", "rtn")
    assert torch.equal(logits(tmp_path / "out"), logits(plain, quantization="int4"))
    assert load_checkpoint(tmp_path / "out").unquantised_layers == tuple(
        f"model.layers.{index}.mlp.down_proj.weight" for index in range(4)
    )


def test_everything_else_is_carried_over_as_it_is(plain, tmp_path):
    quantise_checkpoint(plain, tmp_path / "out", "int4", "rtn")
    before, after = read_tensors(plain), read_tensors(tmp_path / "out")
    for name in before.keys() & after.keys():
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name
    assert {"mtp.fc.weight", "model.layers.0.mlp.down_proj.weight"} <= after.keys()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "a template"
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.linear_attn.in_proj_a", "mtp.layers.0.mlp.up_proj"} <= set(ignored)


def test_a_calibrated_model_is_closer_to_the_plain_one_than_a_rounded_one(plain, tmp_path):
    quantise_checkpoint(plain, tmp_path / "gptq", "int4", "gptq", documents())
    exact = logits(plain)
    distances = {
        name: float((found - exact).norm() / exact.norm())
        for name, found in (
            ("rtn", logits(plain, quantization="int4")),
            ("gptq", logits(tmp_path / "gptq")),
        )
    }
    assert distances["gptq"] < 0.9 * distances["rtn"], distances


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_calibrates_as_well_as_a_cpu(plain, tmp_path):
    exact = logits(plain)
    distances = {}
    for device in ("cpu", "cuda"):
        quantise_checkpoint(plain, tmp_path / device, "int4", "gptq", documents(), device)
        distances[device] = float((logits(tmp_path / device) - exact).norm() / exact.norm())
    # The numbers differ: on the GPU the text went through the layers in bfloat16.
    assert distances["cuda"] < 1.1 * distances["cpu"], distances


@pytest.mark.parametrize(
    ("scheme", "method", "texts", "said"),
    [
        ("fp8", "gptq", [[1, 2]], "gptq rounds to int4, not to fp8"),
        ("int4", "gptq", [], "needs a calibration text"),
    ],
)
def test_what_does_not_go_together_is_refused(plain, tmp_path, scheme, method, texts, said):
    with pytest.raises(InvalidQuantization, match=said):
        quantise_checkpoint(plain, tmp_path / "out", scheme, method, texts)


def test_a_folder_in_use_and_a_quantised_model_are_refused(plain, tmp_path):
    quantise_checkpoint(plain, tmp_path / "out", "int4", "rtn")
    with pytest.raises(InvalidQuantization, match="is not empty"):
        quantise_checkpoint(plain, tmp_path / "out", "int4", "rtn")
    with pytest.raises(InvalidQuantization, match="is quantised already"):
        quantise_checkpoint(tmp_path / "out", tmp_path / "again", "fp8", "rtn")


def test_a_file_in_the_way_and_a_model_without_whole_groups_are_refused(plain, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidQuantization, match="is not a folder"):
        quantise_checkpoint(plain, tmp_path / "file", "int4", "rtn")
    make_checkpoint(tmp_path / "narrow")
    for method in ("rtn", "gptq"):
        with pytest.raises(InvalidQuantization, match="multiple of 128, as int4 needs"):
            quantise_checkpoint(tmp_path / "narrow", tmp_path / "out", "int4", method, [[1, 2]])
    assert not (tmp_path / "out").exists()
