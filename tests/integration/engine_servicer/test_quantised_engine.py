"""A real engine whose weights are rounded at load: it answers as that model does, and shares it."""

import pytest
import torch
from structlog.testing import capture_logs

from kiln_common.settings import ConfigurationError
from kiln_engine.device_side import ModelNotLoaded, load_device_side
from kiln_engine.settings import EngineSettings
from kiln_nn.kernels.quantised import QuantisedMatrix
from kiln_nn.packed_model import PackedModel
from kiln_nn.sharing import attach
from kiln_nn.weights import load_checkpoint
from tests.support.demo_serving import DEMO_MODEL
from tests.support.engine_server import collect, generate_request, running_engine
from tests.support.tiny_models import make_checkpoint

SIZES = {"max_model_len": 256, "kv_cache_tokens": 1024, "max_running": 4, "step_token_budget": 64}
PROMPT = list(range(40, 90))


def settings_for(folder, model, **fields) -> EngineSettings:
    return EngineSettings(model_path=str(model), device="cpu", socket_dir=folder / "run", **SIZES | fields)


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
async def test_it_answers_as_the_rounded_model_and_shares_that(tmp_path, scheme):
    settings = settings_for(tmp_path, DEMO_MODEL, quantization=scheme)
    with capture_logs() as logs:
        parts = load_device_side(settings)
    # On a CPU that is slow, which is said once, with what to do.
    (warning,) = (line for line in logs if line["event"] == "quantised_weights_slow")
    assert (warning["log_level"], warning["scheme"]) == ("warning", scheme)
    assert "--quantization" in warning["hint"]
    async with running_engine(parts, tmp_path) as (_, client):
        request = generate_request("r", PROMPT, temperature=0.0, max_tokens=12)
        outputs = await collect(client, request)
        answer = [token for output in outputs for token in output.token_ids]
        sizes = {part.name: part.num_bytes for part in (await client.get_stats()).memory_parts}
        share = await client.share_weights()
        with attach(share.socket_path, expected_boot_id=share.boot_id) as shared:
            views = shared.views()
            assert isinstance(views["model.layers.0.mlp.up_proj.weight"], QuantisedMatrix)
            assert shared.num_foreign_bytes(views) == 0
            model = PackedModel(shared.manifest.config, views)
            with torch.no_grad():
                ids = torch.tensor([*PROMPT, *answer])
                hidden = model.hidden_states(ids, (0, len(ids)))
                likeliest = model.logits(hidden)[len(PROMPT) - 1 : -1].argmax(-1)
            assert shared.checksum() == (await client.checksum()).sha256
            del views, model
    assert likeliest.tolist() == answer
    assert sizes["weights"] < 0.6 * load_checkpoint(DEMO_MODEL).manifest.nbytes


def test_a_model_that_cannot_be_rounded_stops_the_start_by_name(tmp_path):
    no_whole_groups = {"hidden_size": 48, "intermediate_size": 64, "head_dim": 16, "linear_value_head_dim": 8}
    make_checkpoint(tmp_path / "model", **no_whole_groups)
    with pytest.raises(ModelNotLoaded, match="multiple of 128") as refused:
        load_device_side(settings_for(tmp_path, tmp_path / "model", quantization="int4"))
    assert isinstance(refused.value, ConfigurationError)
    assert refused.value.code == "invalid_quantization"
