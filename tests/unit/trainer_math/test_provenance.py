"""What a job's receipt says it was made with."""

import importlib.metadata

from kiln_trainer.torch_backend.backend import TorchBackend


def _nothing_to_map():
    raise AssertionError("versions need no weights")


def test_the_versions_are_those_installed():
    environment = TorchBackend(_nothing_to_map).environment
    assert environment["kiln"] == importlib.metadata.version("kiln-trainer")


def test_a_source_tree_that_is_not_installed_fails_no_job(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    environment = TorchBackend(_nothing_to_map).environment
    assert environment["kiln"] == "unknown"
    assert "triton" not in environment
