"""Checkpoints on disk: whole or not there, newest first, of this job alone."""

from __future__ import annotations

import errno
from pathlib import Path

import torch

from kiln_trainer.torch_backend.checkpoints import Checkpoint, CheckpointFolder

JOB = "a" * 64


def checkpoint(step: int, job_hash: str = JOB) -> Checkpoint:
    tensors = {"lora/x.lora_A": torch.full((2, 3), float(step)), "stream/old": torch.tensor([torch.nan])}
    return Checkpoint(step, 10 * step, job_hash, {"loss": 0.5}, tensors)


def newest_step(folder: Path, job_hash: str = JOB) -> int | None:
    found = CheckpointFolder(folder).newest(job_hash)
    return found.step if found else None


def test_what_was_written_comes_back(tmp_path):
    CheckpointFolder(tmp_path).write(checkpoint(3))
    found = CheckpointFolder(tmp_path).newest(JOB)
    assert found is not None
    assert (found.step, found.num_tokens, found.metrics) == (3, 30, {"loss": 0.5})
    assert torch.equal(found.group("lora")["x.lora_A"], torch.full((2, 3), 3.0))
    assert found.group("stream")["old"].isnan().all()


def test_an_empty_folder_has_none(tmp_path):
    assert newest_step(tmp_path / "new") is None


def test_only_the_two_newest_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (8, 9, 10, 11):
        folder.write(checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000010.safetensors",
        "step-00000011.safetensors",
    ]


def test_damaged_files_are_passed_over(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.write(checkpoint(1))
    folder.write(checkpoint(2))
    newest = tmp_path / "step-00000002.safetensors"
    content = newest.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"",
        content[:-1] + bytes([content[-1] ^ 1]),  # one bit of one tensor
    ):
        newest.write_bytes(damaged)
        assert newest_step(tmp_path) == 1
    newest.write_bytes(content)
    assert newest_step(tmp_path) == 2


def test_another_jobs_checkpoints_are_not_used(tmp_path):
    CheckpointFolder(tmp_path).write(checkpoint(4))
    assert newest_step(tmp_path, "b" * 64) is None


def test_half_written_files_are_removed_and_never_read(tmp_path):
    leftover = tmp_path / "step-00000009.safetensors.tmp"
    leftover.write_bytes(b"half")
    assert newest_step(tmp_path) is None
    assert not leftover.exists()


def test_a_checkpoint_that_the_disk_refuses_leaves_the_one_before_and_no_rest(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    assert folder.write(checkpoint(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert not folder.write(checkpoint(2))
    assert newest_step(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
