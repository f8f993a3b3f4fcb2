"""`kiln models pull` from a hub on loopback, in a process of its own (the hub's client reads HF_ENDPOINT once)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub_server import COMMIT, HubServer

FILES = {
    "config.json": b'{"model_type": "qwen3_5_text"}',
    "model.safetensors": bytes(range(256)) * 4096,
    "pytorch_model.bin": b"never fetched",
}


def pull(hub, home, *options):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "kiln_cli", "models", "pull", "owner/small", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_models_files_are_fetched_checked_and_named_once(tmp_path):
    with HubServer("owner/small", FILES) as hub:
        done = pull(hub, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert "1/2 config.json" in done.stderr
        folder = Path(done.stdout.strip())
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]

        again = pull(hub, tmp_path / "home", "--json")
        answer = json.loads(again.stdout)
        assert (answer["revision"], answer["files"]) == (COMMIT, 2)
        assert answer["bytes"] == sum(len(FILES[name]) for name in ("config.json", "model.safetensors"))
        assert hub.fetched == ["config.json", "model.safetensors"]  # the second time from the cache


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_the_hubs_is_refused_and_removed(tmp_path, name):
    with HubServer("owner/small", FILES, spoilt=frozenset({name})) as hub:
        done = pull(hub, tmp_path / "home", "--target", str(tmp_path / "here"), "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "checksum_mismatch"
    assert f"{name} of owner/small arrived as" in error["message"]
    assert not (tmp_path / "here" / name).exists()


def test_what_the_hub_does_not_have_says_so(tmp_path):
    with HubServer("owner/other", FILES) as hub:
        done = pull(hub, tmp_path / "home", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "hub_failed"
    with HubServer("owner/small", {"README.md": b"nothing to serve"}) as hub:
        done = pull(hub, tmp_path / "home", "--json")
    assert "has no config.json" in json.loads(done.stdout)["error"]["message"]
