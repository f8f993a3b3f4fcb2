"""Variants of every engine of the tests.

`--quantization int4` (or fp8) has them round their weights (see support/variants.py), `--speculation ngram`
(or mtp) guess ahead, always as far as they may.
"""

import os

import pytest

from tests.support.variants import SETTING


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quantization",
        choices=["fp8", "int4"],
        help="run the engines of the tests on weights of this scheme",
    )
    parser.addoption(
        "--speculation",
        choices=["ngram", "mtp"],
        help="run the engines of the tests with this kind of drafts",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Engines in this process and those started by it read their settings from here.
    if scheme := config.getoption("--quantization"):
        os.environ[SETTING] = scheme
    if kind := config.getoption("--speculation"):
        os.environ["KILN_ENGINE_SPECULATION"] = kind
        os.environ["KILN_ENGINE_ADAPTIVE_DRAFTS"] = "false"
