"""An engine whose small steps read a rounded copy of the head."""

from __future__ import annotations

import pytest
import torch

from kiln_engine.device_side import ModelNotLoaded, load_device_side
from kiln_engine.model.linears import Linears
from kiln_engine.model.small_head import MOST_ROWS
from kiln_engine.settings import EngineSettings
from kiln_nn.kernels.quantised import quantise_rtn
from tests.support.engine_server import collect, generate_request, running_engine
from tests.support.tiny_models import make_checkpoint


def _settings(folder, **fields) -> EngineSettings:
    sizes = {"max_model_len": 64, "kv_cache_tokens": 512, "max_running": 4, "step_token_budget": 64}
    return EngineSettings(
        model_path=str(folder / "model"), device="cpu", socket_dir=folder / "run", **sizes, **fields
    )


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
async def test_few_rows_read_the_rounded_head_and_many_the_whole(scheme, tmp_path):
    config = make_checkpoint(tmp_path / "model", hidden_size=128, tie_word_embeddings=True)
    parts = load_device_side(_settings(tmp_path, head_quantization=scheme))
    model = parts.runner.model
    whole = model.weights["model.embed_tokens.weight"]
    rounded = quantise_rtn(whole, scheme)
    x = torch.randn(MOST_ROWS + 1, config.hidden_size)
    linears = Linears(model.matrices)
    assert torch.equal(linears.head(x), x @ whole.t())
    assert torch.allclose(linears.head(x[:-1]), x[:-1] @ rounded.dequantise(torch.float32).t(), atol=1e-5)
    assert not torch.allclose(linears.head(x[:-1]), x[:-1] @ whole.t(), atol=1e-3)
    arena_bytes = parts.weights.num_bytes
    assert parts.memory.parts["weights"] == arena_bytes + rounded.nbytes
    async with running_engine(parts, tmp_path) as (_, client):
        outputs = await collect(client, generate_request("r", range(10, 20), max_tokens=4))
        assert outputs[-1].error.code == ""


def test_a_width_without_whole_groups_is_refused(tmp_path):
    make_checkpoint(tmp_path / "model", hidden_size=48)
    with pytest.raises(ModelNotLoaded, match="weight has shape"):
        load_device_side(_settings(tmp_path, head_quantization="int4"))
