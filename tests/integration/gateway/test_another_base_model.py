"""A catalogue whose adapters were made for another base model than the one that is served now."""

import pytest

from tests.support.gateway import BASE_MODEL_ID, gateway_rig

OTHER = "0" * 64
GRPO = {"prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        rig.registry.add("old", attach=True, model_hash=OTHER)
        rig.registry.add("fitting")
        yield rig


async def test_its_attached_default_is_ignored_and_that_shows(rig):
    response = await rig.chat(model=BASE_MODEL_ID)
    assert (response.status_code, response.headers["X-Kiln-Adapter"]) == (200, "base")
    assert [list(request.adapters) for request in rig.engine.requests] == [[]]
    adapters = (await rig.http.get("/health")).json()["adapters"]
    assert adapters == {"count": 2, "attached": "old@1", "is_attached_ignored": True}
    # Attaching one that fits ends it.
    assert (await rig.post("/v1/adapters/fitting/attach")).status_code == 200
    assert (await rig.chat()).headers["X-Kiln-Adapter"] == "fitting@1"


async def test_naming_one_is_refused_wherever_it_would_be_used(rig):
    for path, body, param in (
        ("/v1/chat/completions", {"model": "old"}, "model"),
        ("/v1/chat/completions", {"adapter": "old@1"}, "adapter"),
        ("/v1/chat/completions", {"adapters": [{"name": "old"}]}, "adapters"),
        ("/v1/adapters/old/attach", None, "name"),
        ("/v1/train/grpo", {**GRPO, "adapter": "new", "base_adapter": "old"}, "base_adapter"),
        ("/v1/train/grpo", {**GRPO, "adapter": "old"}, "adapter"),
    ):
        if path.endswith("completions"):
            body = {**body, "messages": [{"role": "user", "content": "Hi"}]}
        error = (await rig.post(path, body)).json()["error"]
        assert (error["code"], error["param"]) == ("adapter_mismatch", param), (path, body)
        assert "000000000000" in error["message"]
    assert rig.engine.requests == []
    assert rig.trainer.submitted == []
    # A fresh adapter of the same name needs nothing of the old one.
    assert (
        await rig.post("/v1/train/grpo", {**GRPO, "adapter": "old", "base_adapter": None})
    ).status_code == 202


async def test_the_models_are_those_that_can_answer(rig):
    listed = [model["id"] for model in (await rig.http.get("/v1/models")).json()["data"]]
    assert listed == [BASE_MODEL_ID, "fitting", "fitting@1"]
    assert (await rig.http.get("/v1/models/old@1")).status_code == 404
