"""One thread a process, and variants of every engine of the tests.

`--quantization int4` (or fp8) has them round their weights (see support/variants.py), `--speculation ngram`
(or mtp) guess ahead, always as far as they may.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.variants import SETTING, SPECULATION_SETTING


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


# A run is red for what has changed, neither for examples that were drawn for the first time nor for a busy
# machine's time. `--hypothesis-profile default` draws others.
settings.register_profile(
    "kiln", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kiln")


def pytest_configure(config: pytest.Config) -> None:
    # As services do by default. More threads wait for each other over small matrices, on busy cores most of
    # the time. Processes of the tests read the variable.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Engines in this process and those started by it read their settings from here.
    if scheme := config.getoption("--quantization"):
        os.environ[SETTING] = scheme
    if kind := config.getoption("--speculation"):
        os.environ[SPECULATION_SETTING] = kind
        os.environ["KILN_ENGINE_ADAPTIVE_DRAFTS"] = "false"
