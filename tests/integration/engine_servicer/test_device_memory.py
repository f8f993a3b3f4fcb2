"""What an engine on a GPU tells of its memory."""

import pytest
import torch

from kiln_engine.device_side import load_device_side
from kiln_engine.settings import EngineSettings
from tests.support.engine_server import collect, generate_request, running_engine
from tests.support.gateway import REPOSITORY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
async def test_a_gpus_memory_is_told_by_use_and_by_the_driver(tmp_path):
    sizes = {"max_model_len": 512, "kv_cache_tokens": 4096, "max_running": 4, "step_token_budget": 256}
    settings = EngineSettings(
        model_path=str(REPOSITORY / "demo" / "model"),
        device="cuda",
        socket_dir=tmp_path / "run",
        cuda_graphs=False,
        **sizes,
    )
    async with running_engine(load_device_side(settings), tmp_path) as (_, client):
        outputs = await collect(client, generate_request("r", range(10, 40), max_tokens=4))
        assert outputs[-1].error.code == ""
        stats = await client.get_stats()
    parts = {part.name: part.num_bytes for part in stats.memory_parts}
    allocated = sum(num_bytes for name, num_bytes in parts.items() if name != "workspace")
    used = stats.num_device_bytes - stats.num_device_bytes_free
    assert 0 < allocated <= used < stats.num_device_bytes
    assert 0 < stats.step_seconds.sum < 120
