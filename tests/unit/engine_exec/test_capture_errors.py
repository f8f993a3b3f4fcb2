"""What a failed capture means."""

from __future__ import annotations

import torch

from kiln_engine.device_side import is_out_of_memory


def test_running_out_of_memory_is_seen_behind_the_error_it_causes():
    during_capture = RuntimeError("operation failed due to a previous error during capture")
    during_capture.__context__ = torch.OutOfMemoryError("tried to allocate 2 GiB")
    assert is_out_of_memory(during_capture)
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("operation not permitted when stream is capturing"))
