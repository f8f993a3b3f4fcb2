"""Loading is strict, streams into one arena, and hashes what the checkpoint says, not how it is cut."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kiln_nn.errors import (
    CheckpointMismatch,
    CheckpointNotRead,
    CheckpointRefused,
    CheckpointUnreadable,
    ModelNotFound,
    ShareUnsupported,
    UnsafeCheckpoint,
    UnsupportedModel,
)
from kiln_nn.weights import load_checkpoint
from tests.support.failing_disk import break_file
from tests.support.tiny_models import SHAPES, make_checkpoint, read_tensors

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.3.self_attn.q_proj.weight"


def edit(folder, change):
    """Rewrite the folder's single weight file after `change(tensors)`."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [{}, {"nested": True, "with_vision": True, "num_shards": 3}])
def test_every_tensor_arrives_under_its_canonical_name(tmp_path, shape, form):
    config = make_checkpoint(tmp_path, **form, **SHAPES[shape])
    loaded = load_checkpoint(tmp_path)
    stored, views = read_tensors(tmp_path), loaded.arena.views()
    assert loaded.config == config
    assert loaded.num_vision_tensors == (2 if form else 0)
    assert views.keys() == stored.keys() | {"lm_head.weight"}
    assert all(torch.equal(views[name], tensor) for name, tensor in stored.items())
    assert loaded.arena.num_foreign_bytes(views) == 0


def test_tied_head_is_the_embedding_itself(tmp_path):
    make_checkpoint(tmp_path)
    views = load_checkpoint(tmp_path).arena.views()
    assert views["lm_head.weight"].data_ptr() == views["model.embed_tokens.weight"].data_ptr()


def test_tied_head_may_be_stored_but_not_differ(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    expected = read_tensors(tmp_path)["model.embed_tokens.weight"]
    assert torch.equal(load_checkpoint(tmp_path).arena.views()["lm_head.weight"], expected)
    edit(tmp_path, lambda t: t["lm_head.weight"][0].add_(1))
    with pytest.raises(CheckpointMismatch, match=r"ties lm_head\.weight"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q_PROJ), f"missing: {Q_PROJ}"),
        (lambda t: t.update({"model.layers.9.extra": torch.ones(1)}), r"unexpected: model\.layers\.9\.extra"),
        (lambda t: t.update({Q_PROJ: torch.ones(128, 47)}), rf"misshapen: {Q_PROJ} is \[128, 47\] instead of \[128, 48\]"),
        (lambda t: t.pop("mtp.fc.weight"), r"missing: mtp\.fc\.weight"),
        (lambda t: t.update({Q_PROJ.replace("model.", "model.language_model.", 1): t[Q_PROJ].clone()}), "stored twice"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path, change, said):
    make_checkpoint(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointMismatch, match=said):
        load_checkpoint(tmp_path)


def test_untied_checkpoint_needs_its_head(tmp_path):
    make_checkpoint(tmp_path, tie_word_embeddings=False)
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointMismatch, match=r"missing: lm_head\.weight"):
        load_checkpoint(tmp_path)


def test_long_lists_of_names_are_counted(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.0.")])
    with pytest.raises(CheckpointMismatch, match="and 6 more"):
        load_checkpoint(tmp_path)


def test_checkpoint_without_mtp_tensors_is_fine(tmp_path):
    make_checkpoint(tmp_path, num_mtp_layers=1)
    edit(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])
    loaded = load_checkpoint(tmp_path)
    assert loaded.config.num_mtp_layers == 0
    assert not any(name.startswith("mtp.") for name in loaded.arena.views())


def test_mtp_tensors_are_recognised_without_the_config_saying_so(tmp_path):
    make_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["mtp_num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config.num_mtp_layers == 1
    assert sum(name.startswith("mtp.") for name in loaded.arena.views()) == 15


def test_bfloat16_widens_exactly_on_the_cpu_and_keeps_its_type_on_request(tmp_path):
    make_checkpoint(tmp_path, dtype=torch.bfloat16)
    stored = read_tensors(tmp_path)
    for name, view in load_checkpoint(tmp_path).arena.views().items():
        assert view.dtype == torch.float32
        assert name == "lm_head.weight" or torch.equal(view, stored[name].float())
    views = load_checkpoint(tmp_path, dtype="bfloat16").arena.views()
    assert views[Q_PROJ].dtype == torch.bfloat16
    for kept in (
        "linear_attn.A_log",
        "linear_attn.dt_bias",
        "linear_attn.norm.weight",
        "input_layernorm.weight",
    ):
        assert views[f"model.layers.0.{kept}"].dtype == torch.float32


def test_model_hash_follows_the_values_not_the_files(tmp_path):
    def model_hash(name, dtype="auto", **form):
        if not (tmp_path / name).exists():
            make_checkpoint(tmp_path / name, **form)
        return load_checkpoint(tmp_path / name, dtype=dtype).manifest.model_hash

    plain = model_hash("plain")
    assert plain == model_hash("plain", dtype="float16")
    assert plain == model_hash("sharded", nested=True, with_vision=True, num_shards=4)
    assert plain != model_hash("bf16", dtype="auto", seed=1)
    edit(tmp_path / "plain", lambda t: t["model.norm.weight"][0].add_(1e-3))
    assert plain != load_checkpoint(tmp_path / "plain").manifest.model_hash


def test_progress_counts_stored_bytes_to_the_end(tmp_path):
    make_checkpoint(tmp_path)
    calls = []
    load_checkpoint(tmp_path, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in read_tensors(tmp_path).values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_pickled_weights_are_refused(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin"):
        load_checkpoint(tmp_path)


def test_index_cannot_lead_to_pickles_or_out_of_the_folder(tmp_path):
    make_checkpoint(tmp_path, num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {Q_PROJ: "weights.bin"}}))
    with pytest.raises(UnsafeCheckpoint, match=r"weights\.bin"):
        load_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {Q_PROJ: "../other/model.safetensors"}}))
    with pytest.raises(CheckpointUnreadable, match="not a plain file name"):
        load_checkpoint(tmp_path)


def test_lost_shard_and_lost_tensor_are_told_apart(tmp_path):
    make_checkpoint(tmp_path, num_shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, second)
    with pytest.raises(CheckpointUnreadable, match=name):
        load_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointUnreadable, match=r"model-00002-of-00002\.safetensors, which is not"):
        load_checkpoint(tmp_path)


def test_several_files_need_an_index(tmp_path):
    make_checkpoint(tmp_path, num_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointUnreadable, match="several weight files"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_file_is_unreadable(tmp_path, keep):
    make_checkpoint(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(CheckpointUnreadable, match=WEIGHTS):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_failing_disk_is_not_called_a_damaged_checkpoint(tmp_path, name):
    make_checkpoint(tmp_path, num_shards=2 if name.endswith("index.json") else 1)
    break_file(tmp_path / name)
    with pytest.raises(CheckpointNotRead, match=name) as caught:
        load_checkpoint(tmp_path, "cpu")
    assert not isinstance(caught.value, CheckpointRefused)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_stays_one(tmp_path, name):
    make_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointRefused, match=name):
        load_checkpoint(tmp_path, "cpu")


def test_other_number_formats_are_named(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)}))
    with pytest.raises(UnsupportedModel, match=rf"{Q_PROJ} is stored as F8_E4M3"):
        load_checkpoint(tmp_path)


def test_empty_folder_and_impossible_devices(tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(ShareUnsupported, match="meta"):
        load_checkpoint(tmp_path, device="meta")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelNotFound, match=r"no \*\.safetensors"):
        load_checkpoint(tmp_path)
