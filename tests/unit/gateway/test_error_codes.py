"""docs/errors.md lists every code that the gateway can answer with."""

import ast
import re
from pathlib import Path

import pytest

import kiln_gateway
from kiln_gateway.request_body import HINTS
from tests.support.gateway import REPOSITORY, gateway_rig

PAGE = (REPOSITORY / "docs/errors.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| ([\d, –]+) \|.*\|$", PAGE, flags=re.MULTILINE))


def codes_in_source() -> dict[str, set[str]]:
    """String literals by what they are given to: `code` of a class, or the first argument of a call."""
    found: dict[str, set[str]] = {"code": set(), "InvalidField": set(), "PydanticCustomError": set()}
    for path in Path(kiln_gateway.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found:
                assert isinstance(node.args[0], ast.Constant | ast.Subscript | ast.Attribute), path
                if isinstance(node.args[0], ast.Constant):
                    found[node.func.id].add(node.args[0].value)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                # Also on an object: a code that no class has would be in no table.
                names = {ast.unparse(target).split(".")[-1] for target in node.targets}
                found["code"] |= {node.value.value} if "code" in names else set()
    return found


def test_every_code_in_the_source_is_on_the_page():
    found = codes_in_source()
    assert {"unknown_field", "missing_field"} <= found["InvalidField"]
    assert {"route_not_found", "method_not_allowed", "body_too_large"} <= found["code"]
    assert {"empty_messages", "unsupported_content"} <= found["PydanticCustomError"] & set(HINTS)
    assert found["InvalidField"] <= {*HINTS, "invalid_value"}
    # Other types of a PydanticCustomError are answered as invalid_value.
    answered = found["code"] | found["InvalidField"] | found["PydanticCustomError"] & set(HINTS)
    assert answered - ROWS.keys() == set()


def test_every_code_of_a_body_that_breaks_its_schema_is_raised_somewhere():
    found = codes_in_source()
    assert HINTS.keys() - found["InvalidField"] - found["PydanticCustomError"] == set()


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [("GET", "/v1/nothing", "route_not_found"), ("DELETE", "/v1/completions", "method_not_allowed")],
)
async def test_routes_that_are_not_there_answer_as_the_page_says(tmp_path, method, path, code):
    async with gateway_rig(tmp_path) as rig:
        response = await rig.http.request(method, path)
    error = response.json()["error"]
    assert (error["code"], str(response.status_code)) == (code, ROWS[code])
    assert error["hint"] in PAGE
