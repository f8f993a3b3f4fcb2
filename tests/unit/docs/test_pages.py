"""Every page that names a route, metric, variable, command, file or code names one that there is."""

import re
import sys

import pytest

from kiln_common.errors import KilnError
from kiln_gateway.metrics import GatewayMetrics
from tests.support.doc_pages import PAGES, ROOT, Page, anchors_of, variables_of_source, what_is_wrong_with

NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request):
    return Page(request.param)


@pytest.fixture(scope="module")
def generate_docs():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import generate_docs
    finally:
        sys.path.pop(0)
    return generate_docs


@pytest.fixture(scope="module")
def routes(generate_docs):
    paths = generate_docs.openapi_document()["paths"]
    found = {(method.upper(), pattern(path)) for path, methods in paths.items() for method in methods}
    return found | {("GET", "/openapi.json")}


def pattern(path):
    """The path whatever its parameters are called."""
    return re.sub(r"\{\w+\}", "{}", path.rstrip("/") or "/")


def test_its_routes_exist(page, routes):
    paths = {path for _, path in routes}
    for method, path in page.routes():
        known = (method, pattern(path)) in routes if method else pattern(path) in paths
        assert known or (path.endswith("/") and any(p.startswith(path) for p in paths)), f"{method} {path}"


def test_its_metrics_exist(page):
    known = set()
    for family in GatewayMetrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("", "_bucket", "_sum", "_count")}
        known |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    for name in page.metrics():
        assert name in known or (name.endswith("_") and any(k.startswith(name) for k in known)), name


def test_its_variables_exist(page):
    known = variables_of_source()
    for name in page.variables():
        assert name in known or (name.endswith("_") and any(k.startswith(name) for k in known)), name


def test_its_commands_can_be_run(page):
    wrong = [f"{' '.join(words)}: {why}" for words in page.commands() if (why := what_is_wrong_with(words))]
    assert wrong == []


def test_its_files_and_links_exist(page):
    missing = [name for name in page.files() if not (ROOT / name).exists()]
    assert missing == []
    for link in page.links():
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors_of(path.read_text(encoding="utf-8")), link


def test_its_codes_exist(page):
    known = set(
        re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set(re.findall(r"\b[45]\d\d `(\w+)`", page.text)) <= known


def test_every_error_code_says_what_happened(generate_docs):
    page = generate_docs.errors_page(generate_docs.all_classes())
    rows = re.findall(r"^\| `(\w+)` \| [\d, –]+ \| (.*?) \| .+ \|$", page, re.MULTILINE)
    assert len(rows) == page.count("\n| `") > 200  # a row without a meaning does not match
    # A sentence for whoever meets the error, not a line that goes on in the next one.
    assert [code for code, meaning in rows if not re.fullmatch(r"\S+ \S+ .*\.", meaning)] == []


def test_an_error_class_without_a_meaning_is_noticed(generate_docs):
    class Wordless(KilnError):
        code = "wordless"
        hint = "Say more."

    assert "| `wordless` | 500 |  | Say more. |" in generate_docs.errors_page([Wordless])


def test_the_check_finds_what_is_not_there():
    assert what_is_wrong_with(["kiln", "fly"])
    assert what_is_wrong_with(["kiln", "up", "--wings"])
    assert what_is_wrong_with(["make", "wings"])
    assert what_is_wrong_with(["python", "-m", "kiln_gateway.wings"])
    assert not what_is_wrong_with(["kiln", "up", "--port", "1"])
    assert "KILN_GATEWAY_" + "WINGS" not in variables_of_source()
    assert {"KILN_GATEWAY_PORT", "KILN_REDIS_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"} <= variables_of_source()
