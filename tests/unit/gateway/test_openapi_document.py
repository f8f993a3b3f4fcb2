"""The OpenAPI document says what the routes take."""

from kiln_gateway.openapi import REQUEST_BODIES
from tests.support.gateway import build_rig


async def test_every_body_is_described_and_every_reference_resolves(tmp_path):
    document = build_rig(tmp_path).app.openapi()
    schemas = document["components"]["schemas"]
    for path, model in REQUEST_BODIES.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(model.__name__)
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
    names = {ref.rpartition("/")[2] for ref in _references(document)}
    assert names <= set(schemas)
    assert schemas["ChatCompletionBody"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 2


async def test_no_route_is_there_twice(tmp_path):
    app = build_rig(tmp_path).app
    routes = [(method, route.path) for route in app.state.api_routes for method in route.methods]
    assert len(routes) == len(set(routes))


def _references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
