"""`--speculation ngram` (or mtp) has every engine of the tests guess ahead, always as far as it may."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--speculation",
        choices=["ngram", "mtp"],
        help="run the engines of the tests with this kind of drafts",
    )


def pytest_configure(config: pytest.Config) -> None:
    kind = config.getoption("--speculation")
    if kind:
        # Engines in this process and those started by it read their settings from here.
        os.environ["KILN_ENGINE_SPECULATION"] = kind
        os.environ["KILN_ENGINE_ADAPTIVE_DRAFTS"] = "false"
