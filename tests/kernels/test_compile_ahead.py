"""Runs compile_ahead_cases.py in a process of its own."""

import subprocess
import sys
from pathlib import Path

from tests.support.triton_kernels import needs_triton, only_outside_interpreter


@needs_triton
@only_outside_interpreter
def test_compiling_ahead_in_a_process_that_has_compiled_nothing():
    # As an engine's is when it starts. Behind other kernel tests a Gluon kernel once did not compile here.
    cases = Path(__file__).with_name("compile_ahead_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, cwd=cases.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
