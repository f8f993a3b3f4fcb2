"""Merges in the registry against PEFT's add_weighted_adapter on the same files.

Tolerance: PEFT computes in float32, the registry in float64 and rounds once, so matrices agree to a
few units of float32's last place (1e-6 relative to a matrix's largest entry), and logits of a model
that either is loaded into to 1e-5.
"""

import pytest
import torch

from kiln_common.errors import KilnError
from kiln_common.pb import common_pb2, registry_pb2
from kiln_nn.lora import adapter_table, mtp_table, read_adapter, serialize_adapter
from tests.support.engine_plans import EngineRig, relative_error, token_ids
from tests.support.lora_builders import random_lora
from tests.support.registry import running_registry
from tests.support.tiny_models import hf_model, make_checkpoint

peft = pytest.importorskip("peft")
MODEL_HASH = "cd" * 32
MAX_RANK = 8
TOKENS = token_ids(40)
# "d" and "e" are of other ranks, "c" to "e" on other layers.
ADAPTERS = {
    "a": {"rank": 3, "seed": 1},
    "b": {"rank": 3, "seed": 2},
    "c": {"rank": 3, "seed": 3, "targets": "mlp"},
    "d": {"rank": 2, "seed": 4, "targets": ("q_proj", "down_proj")},
    "e": {"rank": 5, "seed": 5, "targets": "attention"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merges")
    return folder, make_checkpoint(folder, seed=4)


@pytest.fixture(scope="module")
def peft_folders(model, tmp_path_factory):
    """The adapters as PEFT reads them."""
    folders = {}
    for name, fields in ADAPTERS.items():
        lora = random_lora(model[1], **fields)
        folders[name] = tmp_path_factory.mktemp(name)
        config_json, weights = serialize_adapter(lora.tensors(), lora.spec, "tiny")
        (folders[name] / "adapter_config.json").write_text(config_json)
        (folders[name] / "adapter_model.safetensors").write_bytes(weights)
    return folders


@pytest.fixture
async def registry(model, peft_folders, tmp_path):
    modules = [
        common_pb2.AdaptableModule(path=path, in_features=inputs, out_features=outputs)
        for path, (inputs, outputs) in adapter_table(model[1]).items()
    ]
    drafts = [
        common_pb2.AdaptableModule(path=path, in_features=inputs, out_features=outputs)
        for path, (inputs, outputs) in mtp_table(model[1]).items()
    ]
    base = common_pb2.BaseModel(
        model_id="tiny", model_hash=MODEL_HASH, adaptable_modules=modules, draft_modules=drafts
    )
    async with running_registry(tmp_path) as client:
        await client.register_base_model(base, max_adapter_rank=MAX_RANK)
        for name, folder in peft_folders.items():
            header = registry_pb2.PublishHeader(
                name=name,
                base_model_hash=MODEL_HASH,
                config_json=(folder / "adapter_config.json").read_text(),
            )
            await client.publish(header, folder / "adapter_model.safetensors")
        yield client


def merge_request(sources, mode, density=0.5):
    merged_from = [
        registry_pb2.MergeSource(name=name, version=1, weight=weight) for name, weight in sources.items()
    ]
    return registry_pb2.MergeRequest(sources=merged_from, mode=mode, output="merged", density=density)


async def stored_in(folder, registry, version):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(version.config_json)
    (folder / "adapter_model.safetensors").write_bytes(await registry.fetch(version.sha256))
    return folder


@pytest.mark.parametrize(
    ("mode", "sources", "density"),
    [
        ("linear", {"a": 0.7, "b": 0.3}, 0.0),
        ("linear", {"a": 1.0, "b": -0.4, "c": 0.5}, 0.0),
        ("ties", {"a": 1.0, "b": 0.6, "c": 0.8}, 0.3),
        ("ties", {"a": 1.0, "b": -0.5}, 0.7),
        ("ties", {"a": 1.0, "b": 0.5}, 1.0),
        ("concat", {"a": 0.7, "e": -0.4}, 0.0),
        ("concat", {"a": 1.0, "d": 0.25, "c": 0.5}, 0.0),
    ],
)
async def test_a_merge_is_the_one_that_peft_makes(
    model, peft_folders, registry, tmp_path, mode, sources, density
):
    merged = await registry.merge(merge_request(sources, mode, density))
    assert (merged.name, merged.version, merged.merge_mode) == ("merged", 1, mode)
    assert {source.name: source.weight for source in merged.merged_from} == sources
    folder = await stored_in(tmp_path / "merged", registry, merged)

    names = [*sources]
    wrapped = peft.PeftModel.from_pretrained(
        hf_model(model[0]), peft_folders[names[0]], adapter_name=names[0]
    )
    for name in names[1:]:
        wrapped.load_adapter(peft_folders[name], adapter_name=name)
    wrapped.add_weighted_adapter(
        names,
        [*sources.values()],
        adapter_name="theirs",
        combination_type={"concat": "cat"}.get(mode, mode),
        density=density or None,
    )
    theirs = {name: value for name, value in wrapped.state_dict().items() if ".theirs." in name}
    ours = read_adapter(folder, model[1])
    assert len(theirs) == 2 * len(ours.tensors)
    for path, matrices in ours.tensors.items():
        for side, matrix in zip("AB", matrices, strict=True):
            expected = theirs[f"base_model.model.{path}.lora_{side}.theirs.weight"]
            assert (matrix - expected).abs().max() <= 1e-6 * expected.abs().max(), (path, side)

    # Loaded, it computes the same: by peft and by the engine.
    wrapped.set_adapter("theirs")
    loaded = peft.PeftModel.from_pretrained(hf_model(model[0]), folder).eval()
    with torch.no_grad():
        expected = wrapped.eval()(torch.tensor([TOKENS])).logits[0]
        found = loaded(torch.tensor([TOKENS])).logits[0]
    assert relative_error(found, expected) < 1e-5
    rig = EngineRig(model[0])
    rig.adapters.stage(1, (folder / "adapter_model.safetensors").read_bytes(), merged.config_json)
    rig.adapters.activate(1)
    [served] = rig.step(chunks=[rig.chunk(rig.sequence(((1, 1.0),)), TOKENS)])
    assert relative_error(served, expected) < 1e-4


async def test_a_concatenation_is_the_weighted_sum_of_the_updates(model, peft_folders, registry, tmp_path):
    merged = await registry.merge(merge_request({"a": 0.7, "e": -0.4}, "concat"))
    ours = read_adapter(await stored_in(tmp_path / "merged", registry, merged), model[1])
    sources = [
        (read_adapter(peft_folders[name], model[1]), weight) for name, weight in (("a", 0.7), ("e", -0.4))
    ]
    for path, (a, b) in ours.tensors.items():
        expected = sum(
            weight * source.spec.scaling * source.tensors[path][1] @ source.tensors[path][0]
            for source, weight in sources
            if path in source.tensors
        )
        assert (ours.spec.scaling * b @ a - expected).abs().max() <= 1e-6 * expected.abs().max()


async def test_what_cannot_be_merged_is_refused_with_numbers(registry):
    for request, code, said in (
        (merge_request({"a": 1.0, "b": 1.0, "e": 1.0}, "concat"), "adapter_rank_too_high", "3 + 3 + 5 = 11"),
        (merge_request({"a": 1.0, "e": 1.0}, "linear"), "merge_ranks_differ", "ranks 3, 5"),
        (merge_request({"a": 1.0, "d": 1.0}, "ties"), "merge_ranks_differ", "ranks 3, 2"),
        (merge_request({"a": 1.0}, "ties", density=1.5), "invalid_merge", "density is 1.5"),
        (merge_request({"a": 0.0}, "linear"), "invalid_merge", "weight 0"),
        (merge_request({"a": float("nan")}, "linear"), "invalid_merge", "weight nan"),
        (merge_request({}, "linear"), "invalid_merge", "0 sources"),
        (merge_request({"a": 1.0}, "average"), "invalid_merge", "'average'"),
        (merge_request({"nobody": 1.0}, "linear"), "adapter_not_found", "nobody@1"),
    ):
        with pytest.raises(KilnError, match=said.replace("+", r"\+")) as caught:
            await registry.merge(request)
        assert caught.value.code == code
        assert caught.value.hint
    assert "merged" not in [adapter.name for adapter in await registry.list()]


async def test_what_drafts_is_merged_with_the_rest(model, registry, tmp_path):
    """An adapter that brings nothing for that layer adds nothing there."""
    lora = random_lora(model[1], rank=2, seed=31, with_mtp=True)
    config_json, weights = serialize_adapter(lora.tensors(), lora.spec, "tiny")
    (tmp_path / "drafts.safetensors").write_bytes(weights)
    header = registry_pb2.PublishHeader(name="drafts", base_model_hash=MODEL_HASH, config_json=config_json)
    await registry.publish(header, tmp_path / "drafts.safetensors")
    merged = await registry.merge(merge_request({"drafts": 0.5, "a": 1.0}, "concat"))
    found = read_adapter(await stored_in(tmp_path / "merged", registry, merged), model[1])
    assert found.spec.with_mtp
    a, b = found.tensors["mtp.fc"]
    own_a, own_b = lora.tensors()["mtp.fc"]
    torch.testing.assert_close(
        found.spec.scaling * (b @ a), 0.5 * lora.spec.scaling * (own_b @ own_a), rtol=1e-5, atol=1e-6
    )


async def test_layers_that_not_all_sources_have_are_named_whole_in_the_config(
    model, peft_folders, registry, tmp_path
):
    """`target_modules` by short names would claim layers without tensors."""
    wrapped = peft.get_peft_model(
        hf_model(model[0]),
        peft.LoraConfig(
            r=2,
            target_modules=["down_proj"],
            layers_to_transform=[1],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    wrapped.save_pretrained(tmp_path / "part")
    header = registry_pb2.PublishHeader(
        name="part",
        base_model_hash=MODEL_HASH,
        config_json=(tmp_path / "part" / "adapter_config.json").read_text(),
    )
    await registry.publish(header, tmp_path / "part" / "adapter_model.safetensors")
    merged = await registry.merge(merge_request({"part": 2.0}, "linear"))
    folder = await stored_in(tmp_path / "merged", registry, merged)
    loaded = peft.PeftModel.from_pretrained(hf_model(model[0]), folder).eval()
    adapted = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert adapted == ["base_model.model.model.layers.1.mlp.down_proj"]
    assert [*read_adapter(folder, model[1]).tensors] == ["model.layers.1.mlp.down_proj"]
