"""`--quantization int4` (or fp8) has every engine of the tests round its weights (see support/variants.py)."""

import os

import pytest

from tests.support.variants import SETTING


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quantization",
        choices=["fp8", "int4"],
        help="run the engines of the tests on weights of this scheme",
    )


def pytest_configure(config: pytest.Config) -> None:
    scheme = config.getoption("--quantization")
    if scheme:
        # Engines in this process and those started by it read their settings from here.
        os.environ[SETTING] = scheme
