"""Services whose model cannot be served end at once with EXIT_CONFIG, so that nobody starts them again."""

import json
import os
import subprocess
import sys

import pytest

from kiln_common.settings import EXIT_CONFIG
from kiln_engine.device_side import ModelNotLoaded, WeightsNotPlaced
from kiln_nn import errors
from tests.support.failing_disk import break_file

PERMANENT = {
    "invalid_model_config",
    "unsupported_model",
    "unsupported_quantization",
    "invalid_quantization",
    "model_not_found",
    "unsafe_checkpoint",
    "checkpoint_unreadable",
    "checkpoint_mismatch",
}


def _start(service, tmp_path, model):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KILN_")}
    environment |= {
        f"KILN_{service.upper()}_MODEL_PATH": str(model),
        "KILN_ENGINE_SOCKET_DIR": str(tmp_path),
        "KILN_ENGINE_DEVICE": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-m", f"kiln_{service}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("service", ["engine", "gateway"])
def test_a_model_folder_that_is_not_there_is_not_tried_again(service, tmp_path):
    result = _start(service, tmp_path, tmp_path / "nowhere")
    assert result.returncode == EXIT_CONFIG
    code_line, hint_line = result.stderr.splitlines()[-2:]
    assert code_line.startswith("model_folder_missing: ")
    assert str(tmp_path / "nowhere") in code_line
    assert "config.json" in hint_line


def test_a_checkpoint_of_another_kind_is_not_tried_again(tmp_path):
    model = tmp_path / "llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    result = _start("engine", tmp_path, model)
    assert result.returncode == EXIT_CONFIG
    assert result.stderr.splitlines()[-2].startswith("unsupported_model: ")


def test_a_folder_whose_name_means_something_else_needs_a_served_name(tmp_path):
    (tmp_path / "base").mkdir()
    result = _start("engine", tmp_path, tmp_path / "base")
    assert result.returncode == EXIT_CONFIG
    code_line, hint_line = result.stderr.splitlines()[-2:]
    assert code_line.startswith("reserved_model_id: 'base' ")
    assert "KILN_ENGINE_SERVED_MODEL_NAME" in hint_line


@pytest.mark.parametrize(("service", "file_name"), [("engine", "config.json"), ("gateway", "tokenizer.json")])
def test_a_disk_that_fails_is_tried_again(service, file_name, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / file_name).touch()
    break_file(model / file_name)
    result = _start(service, tmp_path, model)
    assert result.returncode == 1
    assert f"{file_name} could not be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_another_start_may_get_over_is_not_called_permanent():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    permanent = {kind.code for kind in kinds if issubclass(kind, errors.CheckpointRefused)}
    assert permanent - {errors.KilnNnError.code} == PERMANENT
    # Memory that another process holds may be free the next time.
    assert not issubclass(errors.OutOfDeviceMemory, errors.CheckpointRefused)
    assert WeightsNotPlaced(errors.OutOfDeviceMemory("full")).code == "out_of_device_memory"
    assert ModelNotLoaded(errors.UnsupportedModel("llama")).code == "unsupported_model"
