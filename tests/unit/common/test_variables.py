"""A misspelt KILN_ variable is named, with what was most likely meant; those that somebody reads are not."""

import json
import os
import re
import subprocess
import sys

import pytest

from kiln_common.setting_names import SETTING_NAMES
from kiln_common.variables import OTHER_VARIABLES, unknown_variables, without_unknown_variables
from tests.support.doc_pages import ROOT

# Reads of the environment by name; settings classes have their own list.
_READ = re.compile(r"""(?:environ(?:\.get|\.setdefault)?[\[(]|getenv\(|envvar=)\s*"(KILN_\w+)\"""")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("KILN_QUANTISATION", "KILN_ENGINE_QUANTIZATION"),  # no service, and another spelling
        ("KILN_ENGINE_QUANTISATION", "KILN_ENGINE_QUANTIZATION"),
        ("KILN_PORT", "KILN_GATEWAY_PORT"),
        ("KILN_ENGINE_PORT", "KILN_GATEWAY_PORT"),  # another service
        ("KILN_TRAINER_LOG_LEVLE", "KILN_TRAINER_LOG_LEVEL"),  # every service has one
        ("KILN_APIKEY", "KILN_API_KEY"),
        ("KILN_SOMETHING_OF_MINE", ""),
    ],
)
def test_an_unknown_name_comes_with_the_nearest_known_one(name, nearest):
    (unknown,) = unknown_variables({name: "secret", "PATH": "/bin"})
    assert (unknown.name, unknown.nearest) == (name, nearest)
    assert name in str(unknown)
    assert nearest in str(unknown)
    assert "secret" not in str(unknown)


def test_names_that_some_service_or_tool_reads_are_known():
    names = (*SETTING_NAMES, *OTHER_VARIABLES, "kiln_engine_device", "KILNS", "OTEL_TRACES_EXPORTER")
    assert unknown_variables(dict.fromkeys(names, "x")) == []


def test_every_variable_that_code_reads_is_known():
    sources = [
        path
        for folder in ("libs", "services", "cli", "scripts", "benchmarks", "demo", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".c")
    ]
    read = {name for path in sources for name in _READ.findall(path.read_text(encoding="utf-8"))}
    assert {"KILN_URL", "KILN_STATE_DIR", "KILN_TEST_CLOCK_FILE"} <= read
    assert unknown_variables(dict.fromkeys(read, "x")) == []


def test_only_unknown_variables_are_left_out():
    environment = {"KILN_QUANTISATION": "fp8", "KILN_ENGINE_DEVICE": "cpu", "HOME": "/"}
    assert without_unknown_variables(environment) == {"KILN_ENGINE_DEVICE": "cpu", "HOME": "/"}


def _run(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KILN_")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_service_says_so_in_its_log(tmp_path):
    # The second one ends the start right behind the warning.
    variables = {"KILN_REGISTRY_STATE_DIRR": "x", "KILN_TLS_CERT_FILE": str(tmp_path / "none.pem")}
    result = _run("kiln_registry", **variables, KILN_REGISTRY_STATE_DIR=str(tmp_path))
    assert result.returncode == 78
    (line,) = [line for line in result.stderr.splitlines() if "unknown_variable" in line]
    entry = json.loads(line)
    assert entry["level"] == "warning"
    assert entry["variable"] == "KILN_REGISTRY_STATE_DIRR"
    assert "did you mean KILN_REGISTRY_STATE_DIR?" in entry["reason"]


def test_the_command_says_so_beside_its_answer():
    result = _run("kiln_cli", "version", "--json", KILN_URLS="http://elsewhere")
    assert json.loads(result.stdout)["version"]
    assert result.stderr == (
        "warning: KILN_URLS is set, and nothing in Kiln reads it; did you mean KILN_URL?\n"
    )
