"""The environment variables that Kiln reads, so that a misspelt one is noticed instead of ignored."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from kiln_common.setting_names import SETTING_NAMES

PREFIX = "KILN_"

# What is read outside of settings classes, and what it does; docs/settings.md lists it too.
OTHER_VARIABLES = {
    "KILN_URL": "the server that the `kiln` command and `kiln.Client()` talk to",
    "KILN_API_KEY": "the key that they send",
    "KILN_STATE_DIR": "`kiln up`, `kiln logs`, `kiln doctor`: the folder for adapters, jobs, Redis data and logs",
    "KILN_REDIS_URL": "`kiln up`: a Redis of yours instead of the private one",
    "KILN_REDIS_MAX_MEMORY_MB": "`kiln up`: most memory of the private Redis",
    "KILN_KERNELS": "`reference` computes in plain PyTorch where a kernel would be used",
    "KILN_PACKAGE": "set by the images: which service a container runs",
    "KILN_BENCH_RESULTS": "benchmarks: the folder for rows; benchmarks/results when not set",
    "KILN_COMMIT": "benchmarks: the commit that rows name, in a tree without its history",
    "KILN_TEST_DEVICE": "tests and benchmarks on the demo model: `cuda` runs them on a GPU",
    "KILN_TEST_DATABASE_URL": "tests: a database for the catalogue's; its tables are dropped first",
    "KILN_TEST_ARTEFACTS": "tests: the folder for the browser's screenshots",
    "KILN_TEST_CLOCK_FILE": "tests: set for processes whose clock is shifted",
    "KILN_CHAOS_OUTAGE_S": "tests/chaos: seconds that things stay away",
    "KILN_SOAK_S": "tests/chaos: seconds of everything at once",
    "KILN_CUT_STREAMS": "tests/e2e: how many streams are cut",
    "KILN_EACH_KERNEL": "tests/parity: try each kernel by itself as well",
    "KILN_KERNEL_COVERAGE": "scripts/gpu: the file that lists the kernels a run has launched",
    "KILN_WRITE_DOCS": "tests/conformance: write the table of OpenAI's fields anew",
}

_KNOWN = frozenset({*SETTING_NAMES, *OTHER_VARIABLES})
_SERVICES = ("ENGINE_", "GATEWAY_", "TRAINER_", "REGISTRY_")
# Below it a guess misleads more often than it helps.
_MIN_LIKENESS = 0.7


@dataclass(frozen=True)
class UnknownVariable:
    """A variable with our prefix that nothing reads; `nearest` is the known name most like it, or ""."""

    name: str
    nearest: str

    def __str__(self) -> str:
        """One line for people. The value stays out of it: it may be a key."""
        guess = (
            f"; did you mean {self.nearest}?" if self.nearest else "; docs/settings.md lists those there are"
        )
        return f"{self.name} is set, and nothing in Kiln reads it{guess}"


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[UnknownVariable]:
    """Those of `environment` (the process's own when left out) that begin with KILN_ and have no reader.

    Names are compared without regard to case, as settings are read. A variable of another service
    is known.
    """
    names = os.environ if environment is None else environment
    return [
        UnknownVariable(name, _nearest(name.upper()))
        for name in sorted(names)
        if name.upper().startswith(PREFIX) and name.upper() not in _KNOWN
    ]


def warn_of_unknown_variables() -> None:
    """One line in the log for each; call it once, after `configure_logs`."""
    import structlog  # here, since the `kiln` command starts faster without it

    for unknown in unknown_variables():
        structlog.get_logger().warning("unknown_variable", variable=unknown.name, reason=str(unknown))


def without_unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """For processes of ours whose parent has warned already."""
    unknown = {variable.name for variable in unknown_variables(environment)}
    return {name: value for name, value in environment.items() if name not in unknown}


def _nearest(name: str) -> str:
    """Whole names are compared, and names without their service: the service is what people leave out."""
    bare_name = _without_service(name)

    def likeness(known: str) -> float:
        bare = difflib.SequenceMatcher(None, bare_name, _without_service(known)).ratio()
        # The whole name decides between services that have a setting of the same name.
        return bare + 0.1 * difflib.SequenceMatcher(None, name, known).ratio()

    best = max(sorted(_KNOWN), key=likeness)
    return best if likeness(best) >= _MIN_LIKENESS else ""


def _without_service(name: str) -> str:
    bare = name.removeprefix(PREFIX)
    for service in _SERVICES:
        bare = bare.removeprefix(service)
    return bare
