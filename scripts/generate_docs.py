"""Writes the pages of docs/ that come from code: error codes, settings, metrics, HTTP routes and fields, commands;
and the names of all settings, for services that know no other's (kiln_common/setting_names.py).

.venv/bin/python scripts/generate_docs.py          # write them
.venv/bin/python scripts/generate_docs.py --check  # exit 1 when one is out of date
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

from cli_page import cli_page
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

DOCS = Path(__file__).resolve().parent.parent / "docs"
SETTING_NAMES = DOCS.parent / "libs/kiln_common/src/kiln_common/setting_names.py"
PACKAGES = (
    "kiln_common",
    "kiln_nn",
    "kiln_gateway",
    "kiln_engine",
    "kiln_trainer",
    "kiln_registry",
    "kiln_cli",
)
HEADER = "<!-- Written by scripts/generate_docs.py; change the code instead. -->\n\n"


def all_classes() -> list[type]:
    """Every class defined in our packages, by module then position."""
    found: dict[type, None] = {}
    for name in PACKAGES:
        package = importlib.import_module(name)
        for info in pkgutil.walk_packages(package.__path__, f"{name}."):
            if info.name.endswith("__main__") or ".pb" in info.name:
                continue
            module = importlib.import_module(info.name)
            for _, item in inspect.getmembers(module, inspect.isclass):
                if item.__module__.split(".")[0] in PACKAGES:
                    found[item] = None
    return list(found)


def errors_page(classes: list[type]) -> str:
    from kiln_common.errors import KilnError
    from kiln_gateway.errors import InvalidField
    from kiln_gateway.request_body import HINTS, MEANINGS
    from kiln_nn.errors import KilnNnError

    # Several services may have a class of one code: what each says, without repetition.
    rows: dict[str, tuple[dict[str, None], dict[str, None], dict[str, None]]] = {}

    def add(code: str, status: str, says: str, hint: str) -> None:
        cells = rows.setdefault(code, ({}, {}, {}))
        for cell, text in zip(cells, (status, says, hint), strict=True):
            if text:
                cell[text] = None

    def cell(texts: dict[str, None]) -> str:
        return " Or: ".join(texts).replace("|", "\\|")

    for item in classes:
        if item is KilnNnError or not issubclass(item, KilnError | KilnNnError) or "code" not in vars(item):
            continue
        kind = getattr(item, "kind", None)
        status = str(getattr(item, "http_status", kind.http_status)) if kind is not None else ""
        says = inspect.cleandoc(vars(item)["__doc__"] or "").split("\n")[0]
        add(item.code, status, says, item.hint)
    for code, hint in HINTS.items():
        if code not in rows:
            add(code, str(InvalidField.kind.http_status), MEANINGS.get(code, ""), hint)
    lines = [
        "# Error codes\n",
        "Every error body has this shape; `code` is stable, `message` has the numbers, `hint` says what to do:\n",
        '```json\n{"error": {"message": "…", "type": "…", "param": null, "code": "…", "hint": "…", "request_id": "…"}}\n```\n',
        "Codes without a status stop a process at its start or end a job; the job's `error` carries them.\n",
        "| code | status | means | hint |\n|---|---|---|---|",
    ]
    lines += [
        f"| `{code}` | {', '.join(status) or '–'} | {cell(says)} | {cell(hint) or '–'} |"
        for code, (status, says, hint) in sorted(rows.items())
    ]
    return HEADER + "\n".join(lines) + "\n"


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "computed" if field.default_factory else "required"
    return "" if field.default in (None, "") else f"`{getattr(field.default, 'value', field.default)}`"


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return text.replace("typing.", "").replace("pathlib.", "").replace("|", "or")


def _settings_classes(classes: list[type]) -> list[type[BaseSettings]]:
    return [item for item in classes if issubclass(item, BaseSettings) and item is not BaseSettings]


def settings_page(classes: list[type]) -> str:
    from kiln_common.variables import OTHER_VARIABLES

    lines = [
        "# Settings\n",
        "Environment variables, read once at start; a bad value stops the start. One that begins with `KILN_` and "
        "is none of these is most likely misspelt: `kiln` and every service say so at their start, with the nearest "
        "name there is, and go on.\n",
    ]
    for item in _settings_classes(classes):
        prefix = item.model_config.get("env_prefix", "")
        lines.append(f"## {item.__name__}\n\n| variable | type | default | means |\n|---|---|---|---|")
        for name, field in item.model_fields.items():
            lines.append(
                f"| `{(prefix + name).upper()}` | {_type_name(field.annotation)} | {_default(field)} "
                f"| {field.description or ''} |"
            )
        lines.append("")
    lines.append("## The command, and tools\n\n| variable | means |\n|---|---|")
    lines += [f"| `{name}` | {meaning} |" for name, meaning in OTHER_VARIABLES.items()]
    return HEADER + "\n".join(lines) + "\n"


def setting_names_module(classes: list[type]) -> str:
    names = {
        f"{item.model_config.get('env_prefix', '')}{field}".upper()
        for item in _settings_classes(classes)
        for field in item.model_fields
    }
    rows = [f'    "{name}",' for name in sorted(names) if name.startswith("KILN_")]
    head = '"""Every setting of every service. Written by scripts/generate_docs.py; change the settings instead."""'
    return "\n".join([head, "", "SETTING_NAMES = (", *rows, ")", ""])


def metrics_page() -> str:
    from kiln_common.pb import engine_pb2, trainer_pb2
    from kiln_gateway.metrics import GatewayMetrics

    metrics = GatewayMetrics()
    # One sample of each, so that its labels show.
    metrics.observe_request("", "", 200, 0.0)
    metrics.rollouts.labels("")
    metrics.moved.labels("")
    stats = engine_pb2.EngineStats(
        memory_parts=[engine_pb2.MemoryPart()], num_device_bytes=1, drafts=[engine_pb2.DraftTotals()]
    )
    status = trainer_pb2.TrainerStatus(num_jobs_ended={"": 0}, metrics={"": 0.0})
    metrics.services.show({"": stats}, {"": status})
    lines = [
        "# Metrics\n",
        "`GET /metrics` of any gateway, in Prometheus' text format. Names beginning with `kiln_gateway_` are that "
        "gateway's own: add them up over gateways. The others are what engines and trainers told it just now, so "
        "every gateway shows the same: take the largest of each, `max by (engine)` or `max by (trainer)`. Those are named in the order of the gateways' addresses: `engine`, `engine-2` and so on, as `kiln up` calls them. Histograms have `_bucket`, "
        "`_sum` and `_count`. `deploy/monitoring` has a scrape configuration, alert rules and a Grafana dashboard "
        "over these.\n",
        "| metric | type | labels | means |\n|---|---|---|---|",
    ]
    for family in metrics.registry.collect():
        if family.name.endswith("_created"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return HEADER + "\n".join(lines) + "\n"


def openapi_document() -> dict[str, Any]:
    """The gateway's own description of its routes and bodies; no service is contacted."""
    from kiln_gateway.app import create_app
    from kiln_gateway.bootstrap import open_clients
    from kiln_gateway.settings import GatewaySettings

    async def build() -> dict[str, Any]:
        settings = GatewaySettings(model_path=str(DOCS.parent / "demo" / "model"))
        async with open_clients(settings) as clients:
            return create_app(settings, clients).openapi()

    return asyncio.run(build())


def api_page(document: dict[str, Any]) -> str:
    lines = [
        "# HTTP API\n",
        "The gateway listens on `:8420`; `GET /openapi.json` has all of this for machines. Errors are described in "
        "[errors.md](errors.md), every field of the OpenAI client in [openai-fields.md](openai-fields.md). A field that is not listed is refused with its name (`unknown_field`, or "
        "`unsupported_field` if others have it), a route with `route_not_found`, and what of either is not built yet "
        "answers 501.\n",
        "| route | does |\n|---|---|",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines.append(f"| `{method.upper()} {path}` | {operation.get('summary', '')} |")
    lines.append("\n# Bodies")
    for name, schema in sorted(document["components"]["schemas"].items()):
        if "properties" in schema:
            lines.append(_schema_table(name, schema))
    return HEADER + "\n".join(lines) + "\n"


def _schema_table(name: str, schema: dict[str, Any]) -> str:
    says = inspect.cleandoc(schema.get("description", ""))
    rows = [f"\n## {name}\n\n{says}\n\n| field | type | default | means |\n|---|---|---|---|"]
    for field, entry in schema["properties"].items():
        default = "required" if field in schema.get("required", ()) else json.dumps(entry.get("default"))
        means = " ".join(entry.get("description", "").split()).replace("|", "\\|")
        rows.append(f"| `{field}` | {_schema_type(entry)} | {default} | {means} |")
    return "\n".join(rows)


def _schema_type(entry: dict[str, Any]) -> str:
    if "$ref" in entry:
        name = entry["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in entry:
            return " or ".join(dict.fromkeys(_schema_type(option) for option in entry[key]))
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    if entry.get("type") == "array":
        return f"list of {_schema_type(entry.get('items', {}))}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {entry[key]:g}" for key, sign in bounds.items() if key in entry]
    return " ".join([entry.get("type", "any"), *limits])


def main() -> int:
    classes = all_classes()
    pages = {
        DOCS / "errors.md": errors_page(classes),
        DOCS / "settings.md": settings_page(classes),
        DOCS / "metrics.md": metrics_page(),
        DOCS / "api.md": api_page(openapi_document()),
        DOCS / "cli.md": HEADER + cli_page(),
        SETTING_NAMES: setting_names_module(classes),
    }
    stale = []
    for path, text in pages.items():
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                stale.append(path.name)
        else:
            path.write_text(text)
    if stale:
        print(f"out of date, run make docs: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
