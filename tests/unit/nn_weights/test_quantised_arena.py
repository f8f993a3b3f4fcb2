"""Weights that are quantised as they are loaded: what becomes of which tensor, and how it lies in the arena."""

import json

import pytest
import torch

from kiln_nn.errors import CheckpointUnreadable, InvalidQuantization
from kiln_nn.kernels.quantised import QuantisedMatrix, quantise_rtn
from kiln_nn.sharing import WeightServer, attach
from kiln_nn.weights import Manifest, load_checkpoint
from kiln_nn.weights.names import is_quantisable
from tests.support.tiny_models import WHOLE_GROUPS, make_checkpoint, read_tensors

SCHEMES = ["fp8", "int4"]
GATE = "model.layers.0.mlp.gate_proj.weight"
IN_PROJ = "model.layers.0.linear_attn.in_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, dtype=torch.bfloat16, **WHOLE_GROUPS)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_matrices_are_rounded_to_nearest_and_the_rest_stays(folder, scheme):
    loaded = load_checkpoint(folder, quantization=scheme)
    stored, views = read_tensors(folder), loaded.arena.views()
    assert loaded.scheme == scheme
    assert loaded.unquantised_layers == ()
    quantised = {name for name, view in views.items() if isinstance(view, QuantisedMatrix)}
    assert quantised == {name for name in stored if is_quantisable(name)}
    # Three DeltaNet layers with three large matrices, one of attention with four, three of each MLP.
    assert len(quantised) == 3 * 3 + 4 + 4 * 3
    for name in quantised:
        expected = quantise_rtn(stored[name], scheme)
        assert views[name].scheme == scheme
        assert torch.equal(views[name].numbers(), expected.numbers())
        assert torch.equal(views[name].scales, expected.scales)
    for name in stored.keys() - quantised:
        assert torch.equal(views[name], stored[name].float())
    assert loaded.arena.num_foreign_bytes(views) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_of_a_fused_matrix_lie_back_to_back_and_so_do_their_scales(folder, scheme):
    arena = load_checkpoint(folder, quantization=scheme, dtype="bfloat16").arena
    views, fused = arena.views(), arena.fused_views()
    both = fused[f"{IN_PROJ}_qkv+in_proj_z.weight"]
    parts = [views[f"{IN_PROJ}_{part}.weight"] for part in ("qkv", "z")]
    for field in ("values", "scales"):
        first, second = (getattr(part, field) for part in parts)
        assert first.data_ptr() + first.nbytes == second.data_ptr()
        assert getattr(both, field).data_ptr() == first.data_ptr()
    assert torch.equal(
        both.dequantise(torch.float32), torch.cat([p.dequantise(torch.float32) for p in parts])
    )
    gates = fused[f"{IN_PROJ}_b+in_proj_a.weight"]
    assert torch.equal(gates, torch.cat([views[f"{IN_PROJ}_{part}.weight"] for part in "ba"]))
    assert fused["model.layers.0.mlp.gate_up_proj.weight"].shape == (512, 128)


def test_the_arena_shrinks_and_the_model_stays_the_same(folder):
    sizes, hashes = {}, set()
    for scheme in ("none", *SCHEMES):
        manifest = load_checkpoint(folder, dtype="bfloat16", quantization=scheme).manifest
        large = sum(e.nbytes for e in manifest.entries if is_quantisable(e.name.removesuffix("_scale")))
        sizes[scheme] = large
        hashes.add(manifest.model_hash)
    assert len(hashes) == 1
    assert sizes["fp8"] == pytest.approx(sizes["none"] / 2, rel=0.04)  # and a scale a row
    assert sizes["int4"] == pytest.approx(sizes["none"] * (4 + 16 / 128) / 16, rel=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_reader_sees_the_owners_matrices(folder, scheme, tmp_path):
    arena = load_checkpoint(folder, quantization=scheme).arena
    socket_path = tmp_path / "private" / "weights.sock"
    with WeightServer(arena, socket_path), attach(socket_path) as shared:
        views = shared.views()
        assert shared.num_foreign_bytes(views) == 0
        assert shared.checksum() == arena.checksum()
        for name, view in arena.views().items():
            if isinstance(view, QuantisedMatrix):
                assert torch.equal(views[name].values.view(torch.uint8), view.values.view(torch.uint8))
                assert torch.equal(views[name].scales, view.scales)
        copied = {GATE: views[GATE].rows(0, 2), "own": quantise_rtn(torch.ones(2, 128), scheme)}
        assert shared.num_foreign_bytes(copied) == copied["own"].nbytes
        del views, copied, view
    arena.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transport", ["vmm", "legacy"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_rounds_as_a_cpu_does(folder, scheme, transport):
    expected = load_checkpoint(folder, dtype="bfloat16", quantization=scheme).arena.checksum()
    before = torch.cuda.memory_reserved()
    arena = load_checkpoint(folder, "cuda", quantization=scheme, transport=transport).arena
    assert arena.checksum() == expected
    assert torch.cuda.memory_reserved() <= before  # what rounding took was given back
    arena.close()


def test_inputs_that_are_no_whole_groups_stay_and_are_told(tmp_path):
    make_checkpoint(tmp_path, dtype=torch.bfloat16, **WHOLE_GROUPS | {"intermediate_size": 192})
    loaded = load_checkpoint(tmp_path, quantization="int4")
    assert loaded.unquantised_layers == tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in range(4))
    assert load_checkpoint(tmp_path, quantization="fp8").unquantised_layers == ()


def test_a_model_without_any_whole_group_is_refused(tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(InvalidQuantization, match="multiple of 128"):
        load_checkpoint(tmp_path, quantization="int4")


def test_a_quantised_manifest_round_trips_and_needs_its_scales(folder):
    manifest = load_checkpoint(folder, quantization="int4").manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    for change in ({"shape": [256, 2], "stride": [2, 1]}, {"encoding": "plain"}, {"name": "other"}):
        raw = json.loads(manifest.to_json())
        next(e for e in raw["entries"] if e["name"] == GATE + "_scale").update(change)
        with pytest.raises(CheckpointUnreadable, match="no sound scales"):
            Manifest.from_json(json.dumps(raw))
    raw = json.loads(manifest.to_json())
    next(e for e in raw["entries"] if e["name"] == GATE)["encoding"] = "fp8"
    with pytest.raises(CheckpointUnreadable, match="no sound scales"):
        Manifest.from_json(json.dumps(raw))
