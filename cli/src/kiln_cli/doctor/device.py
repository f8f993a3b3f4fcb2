"""Checks that compute: a kernel, and weights shared by two processes. They need torch, so they run apart."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kiln_cli.doctor.check import Finding, State, ok
from kiln_cli.up.options import demo_model_dir
from kiln_common.errors import KilnError

_TIMEOUT_S = 180.0  # the first kernel of a machine is compiled


def kernel() -> Finding:
    return _self_test("kernel", hint="Update the driver; KILN_KERNELS=reference does without kernels.")


def shared_weights() -> Finding:
    """With the demo model, by the mechanism that engine and trainer use."""
    try:
        model = demo_model_dir()
    except KilnError as error:
        return Finding(State.SKIPPED, str(error))
    hint = "Both processes need the same user and the same GPU; in containers, one IPC namespace."
    return _self_test("share", str(model), hint=hint)


def sandbox() -> Finding:
    """Whether code can be run isolated here, as kiln agent does."""
    if importlib.util.find_spec("kiln_common.sandbox") is None:
        return Finding(State.SKIPPED, "this installation has no sandbox")
    module = importlib.import_module("kiln_common.sandbox")
    with tempfile.TemporaryDirectory(prefix="kiln-doctor-") as folder:
        try:
            result = module.run("print(6 * 7)", module.Language.PYTHON, Path(folder))
        except KilnError as error:
            return Finding(State.WARNING, str(error), error.hint)
    if result.stdout.strip() != "42":
        return Finding(State.FAILED, f"the sandbox answered {result.stdout!r} {result.stderr[-200:]!r}")
    return ok(f"code runs isolated, in {result.duration_s:.2f} s")


def _self_test(*arguments: str, hint: str) -> Finding:
    command = [sys.executable, "-m", "kiln_nn.self_test", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding(State.FAILED, f"no answer within {_TIMEOUT_S:g} s", hint)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(State.FAILED, last[:300], hint)
    answer = json.loads(done.stdout.splitlines()[-1])
    return ok(answer["detail"]) if answer["is_ok"] else Finding(State.FAILED, answer["detail"], hint)
