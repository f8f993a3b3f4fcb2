"""Options that run the same tests on another engine."""

from __future__ import annotations

import os

import pytest

from tests.support.variants import SETTING


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quantization",
        choices=("none", "fp8", "int4"),
        default=os.environ.get(SETTING, "none"),
        help="round the weights of every engine under test",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Services that tests start read it as well.
    os.environ[SETTING] = config.getoption("--quantization")
