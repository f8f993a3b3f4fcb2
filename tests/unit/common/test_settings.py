"""A bad setting ends a process with one line for each problem, and no secret in it."""

import pytest

from kiln_common.settings import EXIT_CONFIG, ConfigurationError, exit_for_configuration, read_settings
from kiln_engine.settings import EngineSettings
from kiln_gateway.settings import GatewaySettings


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    for prefix in ("KILN_ENGINE_", "KILN_GATEWAY_"):
        monkeypatch.setenv(f"{prefix}MODEL_PATH", "somewhere")


def _lines(settings_class, capsys) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        read_settings(settings_class)
    assert stopped.value.code == EXIT_CONFIG == 78
    return capsys.readouterr().err.splitlines()


def test_good_settings_are_returned(monkeypatch):
    monkeypatch.setenv("KILN_ENGINE_NUM_THREADS", "3")
    assert read_settings(EngineSettings).num_threads == 3


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("NUM_THREADS", "abc", "KILN_ENGINE_NUM_THREADS: 'abc' is not a valid integer"),
        ("DRAIN_TIMEOUT_S", "soon", "KILN_ENGINE_DRAIN_TIMEOUT_S: 'soon' is not a valid number"),
        ("NUM_THREADS", "0", "KILN_ENGINE_NUM_THREADS: '0' should be greater than 0"),
        ("DEVICE", "tpu", "KILN_ENGINE_DEVICE: 'tpu' should be 'auto', 'cpu' or 'cuda'"),
        (
            "LOG_LEVEL",
            "loud",
            "KILN_ENGINE_LOG_LEVEL: 'loud' should be DEBUG, INFO, WARNING, ERROR or CRITICAL",
        ),
    ],
)
def test_the_line_names_the_variable_and_the_fault(monkeypatch, capsys, variable, value, line):
    monkeypatch.setenv(f"KILN_ENGINE_{variable}", value)
    assert _lines(EngineSettings, capsys) == [line]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("base", "means the bare base model, without the default adapter"),
        ("Base", "means the bare base model, without the default adapter"),
        ("billing@3", "means a version of an adapter"),
    ],
)
@pytest.mark.parametrize(
    ("settings_class", "prefix"), [(EngineSettings, "KILN_ENGINE_"), (GatewaySettings, "KILN_GATEWAY_")]
)
def test_a_base_model_is_not_called_what_means_something_else(
    monkeypatch, capsys, settings_class, prefix, name, meaning
):
    monkeypatch.setenv(f"{prefix}SERVED_MODEL_NAME", name)
    line = f"{prefix}SERVED_MODEL_NAME: {name!r} {meaning}; give the base model another id"
    assert _lines(settings_class, capsys) == [line]


@pytest.mark.parametrize("name", ["", "basement", "Qwen/Qwen3.5-4B", "kiln-demo", "org/model@main", "a@b"])
def test_other_names_are_free(monkeypatch, name):
    monkeypatch.setenv("KILN_ENGINE_SERVED_MODEL_NAME", name)
    assert read_settings(EngineSettings).served_model_name == name


def test_each_problem_has_its_line(monkeypatch, capsys):
    monkeypatch.delenv("KILN_ENGINE_MODEL_PATH")
    monkeypatch.setenv("KILN_ENGINE_NUM_THREADS", "abc")
    assert set(_lines(EngineSettings, capsys)) == {
        "KILN_ENGINE_MODEL_PATH: is required, and not set",
        "KILN_ENGINE_NUM_THREADS: 'abc' is not a valid integer",
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("sk-secret", "KILN_GATEWAY_API_KEYS: the value is not valid JSON"),
        ('"sk-secret"', "KILN_GATEWAY_API_KEYS: the value should be a valid tuple"),
        ('["sk-secret"]', "KILN_GATEWAY_API_KEYS [0]: the value should be a valid dictionary"),
        ('[{"key": "sk-secret"}]', "KILN_GATEWAY_API_KEYS [0] key: the value should have at least 16"),
        ('[{"sk-secret": "infer", "key": "0123456789abcdef"}]', "KILN_GATEWAY_API_KEYS [0]: Extra"),
        ('[{"scopes": ["sk-secret"]}]', "KILN_GATEWAY_API_KEYS [0] scopes [0]: the value should be"),
        ("[{}]", "KILN_GATEWAY_API_KEYS [0]: each key needs either `key` or `sha256`"),
    ],
)
def test_keys_are_never_shown(monkeypatch, capsys, keys, expected):
    monkeypatch.setenv("KILN_GATEWAY_API_KEYS", keys)
    lines = _lines(GatewaySettings, capsys)
    assert lines[0].startswith(expected)
    assert "sk-secret" not in "\n".join(lines)


def test_a_fault_of_several_settings_together_is_said_as_it_is(monkeypatch, capsys):
    monkeypatch.delenv("KILN_GATEWAY_API_KEYS", raising=False)
    monkeypatch.setenv("KILN_GATEWAY_HOST", "0.0.0.0")
    (line,) = _lines(GatewaySettings, capsys)
    assert line.startswith("host 0.0.0.0 is not loopback")


def test_an_error_of_the_configuration_ends_the_process_with_its_hint(capsys):
    with pytest.raises(SystemExit) as stopped:
        exit_for_configuration(ConfigurationError("no such thing", hint="Choose another."))
    assert stopped.value.code == EXIT_CONFIG
    assert capsys.readouterr().err.splitlines() == ["internal_error: no such thing", "  Choose another."]
