"""The agent's tools in the real sandbox: what code can do, what it cannot, and what stops it."""

import pytest

from kiln_cli.agent.tools import ToolLimits, Workbench
from kiln_common import sandbox

MIB = 2**20


@pytest.fixture
def bench(tmp_path):
    try:
        return Workbench(tmp_path, ToolLimits(time_s=5.0, memory_bytes=256 * MIB))
    except sandbox.SandboxUnavailable as error:
        pytest.skip(str(error))


def test_code_computes_and_its_folder_is_kept_between_calls(bench, tmp_path):
    assert bench.run("python", "print(6 * 7); open('kept', 'w').write('yes')").output == "42"
    assert bench.run("shell", "cat kept").output == "yes"
    assert (tmp_path / "kept").read_text() == "yes"


def test_code_has_no_network_and_writes_nowhere_else(bench):
    network = bench.run("python", "import socket; socket.create_connection(('1.1.1.1', 53), 2)")
    assert network.exit_code != 0
    outside = bench.run("shell", "echo x > /etc/kiln-was-here")
    assert outside.exit_code != 0
    assert "Read-only" in outside.output or "denied" in outside.output.lower()


def test_code_that_does_not_end_is_ended_and_the_reason_said(tmp_path, bench):
    quick = Workbench(tmp_path, ToolLimits(time_s=0.5, memory_bytes=256 * MIB))
    endless = quick.run("python", "while True: pass")
    assert endless.exit_code is None
    assert endless.stopped
    assert "[ended: " in endless.for_model()


def test_long_output_is_cut_for_the_model(bench):
    found = bench.run("python", "print('x' * 20000)")
    assert found.output.endswith("[12000 more characters]")
