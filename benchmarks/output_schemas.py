"""Twenty JSON schemas to generate from, and whether what they allow is bounded in length.

Bounded: every string, number and array has a largest size, and no object takes properties that the
schema does not name. A small model drawn from at temperature 1 comes to the end of those; the others
it may go on with until its tokens are spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

JsonSchema = dict[str, Any]


@dataclass(frozen=True)
class NamedSchema:
    name: str
    schema: JsonSchema
    is_bounded: bool = True


def closed(properties: dict[str, Any], *, optional: tuple[str, ...] = (), **more: Any) -> JsonSchema:
    """An object with these properties and no others, all required but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **more,
    }


def text(most: int, **more: Any) -> JsonSchema:
    return {"type": "string", "maxLength": most, **more}


def whole(low: int, high: int) -> JsonSchema:
    return {"type": "integer", "minimum": low, "maximum": high}


_ADDRESS = closed({"street": text(24), "city": text(16), "zip": text(5, pattern="^[0-9]{5}$")})
_TREE = closed(
    {"value": whole(0, 9), "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}}
)
_SHAPES = [
    closed({"kind": {"const": "circle"}, "radius": whole(1, 100)}),
    closed({"kind": {"const": "square"}, "side": whole(1, 100)}),
]

SCHEMAS = (
    NamedSchema("flat object", closed({"name": text(20), "age": whole(0, 120), "member": {"type": "boolean"}})),
    NamedSchema("nested objects", closed({"person": closed({"name": text(12), "address": _ADDRESS})})),
    NamedSchema("enum of strings", closed({"status": {"enum": ["open", "held", "closed"]}})),
    NamedSchema("enum of mixed values", closed({"value": {"enum": [1, "one", None, True, [1, 2], {"a": 0}]}})),
    NamedSchema("union of types", closed({"id": {"anyOf": [whole(1, 9999), text(8), {"type": "null"}]}})),
    NamedSchema("tagged union", {"anyOf": _SHAPES}),
    NamedSchema("list of a union", {"type": "array", "items": {"anyOf": _SHAPES}, "minItems": 1, "maxItems": 3}),
    NamedSchema("string lengths", closed({"code": text(8, minLength=8), "note": text(40, minLength=3)})),
    NamedSchema("string patterns", closed({"sku": text(8, pattern="^[A-Z]{2}-[0-9]{4}$"), "hex": text(6, pattern="^[0-9a-f]+$")})),
    NamedSchema("bounded integers", closed({"a": whole(-5, 5), "b": whole(1000, 1010), "c": whole(-200, -100)})),
    NamedSchema("exclusive bounds", closed({"n": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}})),
    NamedSchema("arrays", closed({"tags": {"type": "array", "items": text(10), "minItems": 2, "maxItems": 4}})),
    NamedSchema("tuple", {"type": "array", "prefixItems": [whole(0, 9), text(6), {"type": "boolean"}], "items": False, "minItems": 3}),
    NamedSchema("formats", closed({"day": {"type": "string", "format": "date"}, "time": {"type": "string", "format": "time"}, "id": {"type": "string", "format": "uuid"}, "host": {"type": "string", "format": "ipv4"}})),
    NamedSchema("optional properties", closed({"a": whole(0, 9), "b": text(6), "c": {"type": "boolean"}}, optional=("b", "c"))),
    NamedSchema("allOf", {"allOf": [closed({"a": whole(0, 100)}), {"properties": {"a": {"minimum": 10}}}]}),
    NamedSchema("recursion, bounded lists", {"$defs": {"node": _TREE}, "$ref": "#/$defs/node"}, is_bounded=False),
    NamedSchema("recursion, linked list", {"$defs": {"link": closed({"v": whole(0, 9), "next": {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]}})}, "$ref": "#/$defs/link"}, is_bounded=False),
    NamedSchema("free strings and numbers", closed({"title": {"type": "string"}, "score": {"type": "number"}}), is_bounded=False),
    NamedSchema("open object", {"type": "object", "additionalProperties": {"type": "integer"}}, is_bounded=False),
)  # fmt: skip
