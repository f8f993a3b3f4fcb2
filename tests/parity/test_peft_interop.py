"""Adapters that `peft` saved, through registry and gateway into the engine and back into `peft`.

Tolerance as in test_engine_adapters: float32 sums in another order stay below 1e-4 of the largest
logit. Adapters in half precision are held to the same, since both sides widen the same numbers.
"""

import io
import json
import math
import tarfile

import pytest
import torch

from kiln_common.errors import KilnError
from kiln_common.pb import common_pb2, registry_pb2
from kiln_nn.lora import adapter_table
from tests.support.engine_plans import EngineRig, relative_error, token_ids
from tests.support.gateway import gateway_rig
from tests.support.registry import running_registry
from tests.support.tiny_models import hf_model, make_checkpoint

peft = pytest.importorskip("peft")
TOLERANCE = 1e-4
MODEL_HASH = "ef" * 32
TOKENS = token_ids(40)
ALL = [
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj", "k_proj", "v_proj"),
    *("o_proj", "gate_proj", "up_proj", "down_proj"),
]
PATTERNS = {
    "rank_pattern": {"down_proj": 5, "layers.0.mlp.gate_proj": 2, "^model.layers.1.mlp.up_proj": 1},
    "alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 20, "model\\.layers\\.0\\.mlp\\.up_proj": 0.5},
}
SAVED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "some layers": {"target_modules": ["down_proj", "v_proj"], "layers_to_transform": [1, 3]},
    "bfloat16": {"use_rslora": True, **PATTERNS, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop")
    return folder, make_checkpoint(folder, seed=4)


@pytest.fixture
async def registry(model, tmp_path):
    modules = [
        common_pb2.AdaptableModule(path=path, in_features=inputs, out_features=outputs)
        for path, (inputs, outputs) in adapter_table(model[1]).items()
    ]
    base = common_pb2.BaseModel(model_id="tiny", model_hash=MODEL_HASH, adaptable_modules=modules)
    async with running_registry(tmp_path / "registry") as client:
        await client.register_base_model(base, max_adapter_rank=8)
        yield client


def peft_model(folder, seed=0, **fields):
    """PEFT's LoRA around transformers' model, A and B large enough to matter; saved numbers are exact."""
    dtype = fields.pop("dtype", torch.float32)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **fields}
    wrapped = peft.get_peft_model(hf_model(folder), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn.to(dtype).float())
    return wrapped.eval()


def logits_of(module):
    with torch.no_grad():
        return module(torch.tensor([TOKENS])).logits[0]


async def publish(registry, folder, name="theirs"):
    header = registry_pb2.PublishHeader(
        name=name,
        base_model_hash=MODEL_HASH,
        config_json=(folder / "adapter_config.json").read_text(),
    )
    return await registry.publish(header, folder / "adapter_model.safetensors")


async def stage(rig, slot, registry, version):
    rig.adapters.stage(slot, await registry.fetch(version.sha256), version.config_json)
    rig.adapters.activate(slot)


@pytest.mark.parametrize("case", SAVED)
async def test_what_peft_saved_is_served_with_its_logits_and_comes_back_whole(
    model, registry, tmp_path, case
):
    wrapped = peft_model(model[0], **SAVED[case])
    expected = logits_of(wrapped)
    assert relative_error(logits_of(hf_model(model[0])), expected) > 1e-2
    if "dtype" in SAVED[case]:
        wrapped = wrapped.to(SAVED[case]["dtype"])  # its numbers fit
    wrapped.save_pretrained(tmp_path / "saved")
    version = await publish(registry, tmp_path / "saved")

    rig = EngineRig(model[0])
    await stage(rig, 1, registry, version)
    [served] = rig.step(chunks=[rig.chunk(rig.sequence(((1, 1.0),)), TOKENS)])
    assert relative_error(served, expected) < TOLERANCE

    async with gateway_rig(tmp_path, registry=registry) as gateway:
        packed = (await gateway.http.get("/v1/adapters/theirs/download")).content
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(tmp_path)
    loaded = peft.PeftModel.from_pretrained(hf_model(model[0]), tmp_path / "theirs-1").eval()
    assert relative_error(logits_of(loaded), expected) < 1e-5


async def test_the_same_numbers_with_another_scaling_are_another_adapter(model, registry, tmp_path):
    """Engines know an adapter by the hash of its bytes, and alpha is not among them."""
    peft_model(model[0]).save_pretrained(tmp_path / "saved")
    versions = [await publish(registry, tmp_path / "saved")]
    config_path = tmp_path / "saved" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "use_rslora": True}))
    versions.append(await publish(registry, tmp_path / "saved"))
    assert versions[0].sha256 != versions[1].sha256
    assert versions[0].source_sha256 == versions[1].source_sha256 == versions[0].sha256
    rig = EngineRig(model[0])
    for slot, version in enumerate(versions, start=1):
        await stage(rig, slot, registry, version)
        loaded = peft_model(model[0], use_rslora=slot == 2)
        [served] = rig.step(chunks=[rig.chunk(rig.sequence(((slot, 1.0),)), TOKENS)])
        assert relative_error(served, logits_of(loaded)) < TOLERANCE
    # The same again is the same bytes again.
    assert (await publish(registry, tmp_path / "saved")).sha256 == versions[1].sha256


async def test_adapters_of_one_request_add_up_as_in_peft(model, registry, tmp_path):
    scales = {"first": 0.7, "second": -0.4}
    fields = {"first": {"use_rslora": True}, "second": {"r": 5, "target_modules": ["down_proj", "q_proj"]}}
    rig = EngineRig(model[0])
    for slot, name in enumerate(scales, start=1):
        peft_model(model[0], seed=slot, **fields[name]).save_pretrained(tmp_path / name)
        await stage(rig, slot, registry, await publish(registry, tmp_path / name, name))
    wrapped = peft.PeftModel.from_pretrained(hf_model(model[0]), tmp_path / "first", adapter_name="first")
    wrapped.load_adapter(tmp_path / "second", adapter_name="second")
    wrapped.base_model.set_adapter([*scales])
    for module in wrapped.modules():
        for name, scale in scales.items():
            if hasattr(module, "set_scale") and name in module.scaling:
                module.set_scale(name, scale)
    slots = tuple(enumerate(scales.values(), start=1))
    [served] = rig.step(chunks=[rig.chunk(rig.sequence(slots), TOKENS)])
    assert relative_error(served, logits_of(wrapped.eval())) < TOLERANCE


REFUSED = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("feature", REFUSED)
async def test_what_is_not_served_is_refused_by_its_name(model, registry, tmp_path, feature):
    fields = {"target_modules": ["down_proj"], **REFUSED[feature]}
    if feature == "bias":  # the model has no biases to adapt, so PEFT would save none
        peft_model(model[0], target_modules=["down_proj"]).save_pretrained(tmp_path / "saved")
        config_path = tmp_path / "saved" / "adapter_config.json"
        config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "bias": "lora_only"}))
    else:
        peft_model(model[0], **fields).save_pretrained(tmp_path / "saved")
    with pytest.raises(KilnError, match=feature) as caught:
        await publish(registry, tmp_path / "saved")
    assert (caught.value.code, caught.value.kind.http_status) == ("unsupported_adapter_feature", 400)
    assert len(caught.value.hint) > 20
    assert await registry.list() == []


@pytest.mark.parametrize("kind", ["LoHaConfig", "IA3Config", "VeraConfig"])
async def test_other_methods_of_peft_are_refused_by_their_name(model, registry, tmp_path, kind):
    fields = {"target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    if kind == "IA3Config":
        fields["feedforward_modules"] = ["down_proj"]
    wrapped = peft.get_peft_model(hf_model(model[0]), getattr(peft, kind)(**fields))
    wrapped.save_pretrained(tmp_path / "saved")
    with pytest.raises(KilnError, match=f'peft_type="{kind.removesuffix("Config").upper()}"') as caught:
        await publish(registry, tmp_path / "saved")
    assert caught.value.code == "unsupported_adapter_feature"


async def test_patterns_that_do_not_fit_their_tensors_are_refused(model, registry, tmp_path):
    peft_model(model[0], rank_pattern={"down_proj": 5}).save_pretrained(tmp_path / "saved")
    config_path = tmp_path / "saved" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    for fields, code, said in (
        ({"rank_pattern": {"down_proj": 4}}, "adapter_rank_mismatch", "rank for it is 4"),
        ({"rank_pattern": {"(a+)+$": 4}}, "unsupported_adapter_feature", "the expression"),
        ({"rank_pattern": {"down_proj": 0}}, "invalid_adapter_config", "1 to 256"),
        ({"rank_pattern": ["down_proj"]}, "invalid_adapter_config", "object"),
        ({"alpha_pattern": {"q_proj": -1}}, "invalid_adapter_config", "positive"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "invalid_adapter_config", "positive"),
        ({"use_rslora": "yes"}, "invalid_adapter_config", "use_rslora"),
        ({"rank_pattern": {"down_proj": 9}, "r": 9}, "adapter_rank_mismatch", "is 9"),
    ):
        config_path.write_text(json.dumps({**config, **fields}))
        with pytest.raises(KilnError, match=said) as caught:
            await publish(registry, tmp_path / "saved")
        assert caught.value.code == code, fields
    assert await registry.list() == []


async def test_a_rank_by_pattern_counts_against_the_engines_limit(model, registry, tmp_path):
    peft_model(model[0], rank_pattern={"down_proj": 9}).save_pretrained(tmp_path / "saved")
    with pytest.raises(KilnError, match="rank 9, the engine holds up to 8"):
        await publish(registry, tmp_path / "saved")
