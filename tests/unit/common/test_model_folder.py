"""A model is a folder or a hub id; the hub is asked only for what is not a folder."""

import errno
from pathlib import Path

import pytest

from kiln_common.model_folder import HubFailed, ModelFileNotRead, ModelFolderMissing, find_model_folder


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub client, the one leaf that needs a network; records what was asked."""
    import huggingface_hub

    asked = {}

    def install(answer):
        def snapshot_download(repo_id, allow_patterns):
            asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return install


def test_folder_is_used_as_it_is(tmp_path, hub):
    asked = hub(AssertionError("the hub must not be asked"))
    assert find_model_folder(tmp_path) == tmp_path
    assert not asked


def test_a_failing_disk_is_not_a_folder_that_is_missing(tmp_path, hub, monkeypatch):
    asked = hub(AssertionError("the hub must not be asked"))

    def stat(path, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(ModelFileNotRead, match="Stale file handle"):
        find_model_folder(tmp_path)
    assert not asked


def test_hub_id_is_fetched_without_pickles(tmp_path, hub):
    asked = hub(tmp_path)
    assert find_model_folder("Qwen/Qwen3.5-0.8B") == tmp_path
    assert asked["repo_id"] == "Qwen/Qwen3.5-0.8B"
    assert not [pattern for pattern in asked["allow_patterns"] if "bin" in pattern or pattern == "*"]


def test_being_offline_is_said(hub):
    hub(OSError("cannot reach the hub\nlong explanation"))
    with pytest.raises(HubFailed, match=r"Qwen/Qwen3\.5-0\.8B .* cannot reach the hub$"):
        find_model_folder("Qwen/Qwen3.5-0.8B")


@pytest.mark.parametrize("name", ["/no/such/folder", "plainname", "a/b/c", "../up"])
def test_what_is_neither_is_refused_without_asking(name, hub):
    asked = hub(AssertionError("the hub must not be asked"))
    with pytest.raises(ModelFolderMissing):
        find_model_folder(name)
    assert not asked
