"""How tensors lie in the arena, and that a manifest from outside is checked before it is used."""

import json
from itertools import pairwise

import pytest
import torch

from kiln_nn.errors import CheckpointUnreadable, UnsupportedModel
from kiln_nn.weights import Manifest, expected_tensors, load_checkpoint
from kiln_nn.weights.manifest import lay_out
from tests.support.tiny_models import make_checkpoint, tiny_config


@pytest.fixture
def loaded(tmp_path):
    make_checkpoint(tmp_path)
    return load_checkpoint(tmp_path)


def test_tensors_are_aligned_and_do_not_overlap(loaded):
    own = sorted((e for e in loaded.manifest.entries if e.kind != "alias"), key=lambda e: e.offset)
    for before, after in pairwise(own):
        assert before.offset + before.nbytes <= after.offset
        is_continuation = after.kind == "row_slice" and after.source == before.source
        assert after.offset == before.offset + before.nbytes if is_continuation else after.offset % 256 == 0
    assert own[-1].offset + own[-1].nbytes == loaded.manifest.nbytes


def test_fused_views_are_the_parts_stacked(loaded):
    views, fused = loaded.arena.views(), loaded.arena.fused_views()
    parts = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    stacked = torch.cat([views[f"model.layers.0.linear_attn.{part}.weight"] for part in parts])
    assert torch.equal(fused["model.layers.0.linear_attn.in_proj.weight"], stacked)
    stacked = torch.cat([views[f"mtp.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(fused["mtp.layers.0.self_attn.qkv_proj.weight"], stacked)
    assert loaded.arena.num_foreign_bytes(fused) == 0


def test_parts_of_different_types_are_not_fused():
    config = tiny_config()
    specs = expected_tensors(config, include_mtp=False)
    dtypes = dict.fromkeys(specs, torch.bfloat16) | {"model.layers.0.mlp.up_proj.weight": torch.float32}
    kinds = {entry.name: entry.kind for entry in lay_out(specs, dtypes, is_tied=True)}
    assert kinds["model.layers.0.mlp.gate_proj.weight"] == "own"
    assert kinds["model.layers.1.mlp.gate_proj.weight"] == "row_slice"
    assert kinds["lm_head.weight"] == "alias"


def test_copied_tensors_count_as_foreign(loaded):
    views = loaded.arena.views()
    copied = {**views, "model.norm.weight": views["model.norm.weight"].clone()}
    assert loaded.arena.num_foreign_bytes(copied) == copied["model.norm.weight"].nbytes


def test_checksum_is_of_the_bytes(tmp_path):
    make_checkpoint(tmp_path / "a")
    make_checkpoint(tmp_path / "b", seed=1)
    first, again, other = (load_checkpoint(tmp_path / name).arena.checksum() for name in "aab")
    assert first == again != other


def test_manifest_round_trips_as_json(loaded):
    assert Manifest.from_json(loaded.manifest.to_json()) == loaded.manifest
    assert len(loaded.manifest.boot_id) == 32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"offset": 1 << 40}, "unsound"),
        ({"offset": -4}, "unsound"),
        ({"offset": 2}, "unsound"),
        ({"shape": [10**12, 48]}, "unsound"),
        ({"stride": [0, 0]}, "unsound"),
        ({"dtype": "object"}, "unsound"),
        ({"kind": "stolen"}, "unsound"),
        ({"shape": None}, "malformed"),
        ({"surprise": 1}, "malformed"),
    ],
)
def test_unsound_entries_are_refused(loaded, change, said):
    raw = json.loads(loaded.manifest.to_json())
    raw["entries"][0].update(change)
    with pytest.raises(CheckpointUnreadable, match=said):
        Manifest.from_json(json.dumps(raw))


def test_an_encoding_that_is_not_known_is_refused_by_name(loaded):
    raw = json.loads(loaded.manifest.to_json())
    raw["entries"][0]["encoding"] = "w4a16"
    with pytest.raises(UnsupportedModel, match="w4a16"):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize("change", [{"transport": "pickle"}, {"nbytes": 0}, {"nbytes": "many"}, {"extra": 1}])
def test_unsound_manifests_are_refused(loaded, change):
    raw = json.loads(loaded.manifest.to_json()) | change
    with pytest.raises(CheckpointUnreadable, match="manifest"):
        Manifest.from_json(json.dumps(raw))
