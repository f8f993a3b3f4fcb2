"""When a Triton kernel is chosen, and that nothing needs Triton to be installed."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from kiln_nn.kernels.dispatch import device_limits, takes_triton

_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # makes the import fail
import torch
import kiln_nn.packed_model
from kiln_nn.kernels.dispatch import has_triton
from kiln_nn.kernels.paged_attention import paged_decode_attention
from kiln_nn.kernels.qk_norm_rope_write import qk_norm_rope_write
from kiln_nn.kernels.rms_norm import add_rms_norm
from kiln_nn.kernels.swiglu import swiglu
out, total = add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.zeros(4), 1e-6, offset=1.0)
assert total.eq(2).all() and swiglu(out, out).isfinite().all()
"""


def test_tensors_on_the_cpu_go_to_the_references():
    assert not takes_triton(torch.zeros(2))


def test_limits_without_a_gpu_are_those_of_the_smallest():
    assert device_limits(torch.device("cpu")).shared_memory_bytes == 99 * 1024


def test_the_kernels_package_works_without_triton():
    subprocess.run([sys.executable, "-c", _WITHOUT_TRITON], check=True)


def test_without_a_c_compiler_the_references_serve_and_the_reason_is_named():
    code = "from kiln_nn.kernels.dispatch import why_no_triton; print(why_no_triton())"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")
    }
    environment["PATH"] = ""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert "no C compiler" in done.stdout or "not installed" in done.stdout


def test_the_environment_can_force_the_references():
    code = "from kiln_nn.kernels.dispatch import has_triton; assert not has_triton()"
    environment = {**os.environ, "KILN_KERNELS": "reference"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
