"""What `kiln up` says of a service that is ready."""

from kiln_cli.up.readiness import describe
from kiln_common.pb import common_pb2, engine_pb2


def test_an_engine_names_what_changes_its_answers_or_its_speed():
    info = engine_pb2.EngineInfo(
        base_model=common_pb2.BaseModel(model_id="demo"),
        device="cpu",
        dtype="float32",
        num_pages=100,
        page_tokens=16,
    )
    assert describe(info) == "demo on cpu, float32, room for 1,600 tokens"
    info.weights_scheme, info.speculation = "int4", "mtp"
    assert describe(info) == "demo on cpu, float32, int4 weights, drafts by mtp, room for 1,600 tokens"
