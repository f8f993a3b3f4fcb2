"""What `kiln` says about itself."""

import pytest
from typer.testing import CliRunner

import kiln_cli
from kiln_cli.main import app


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_the_version_is_printed(arguments):
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, f"{kiln_cli.__version__}\n")


def test_the_demos_help_explains_its_exit_codes():
    result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for meaning in ("Exit code 0: it learned", "1: it ran to its end", "2: it could not", "130: it was"):
        assert meaning in " ".join(result.output.split())
