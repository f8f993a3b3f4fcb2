"""Which tests launch which Triton kernels: a pytest plugin, and a choice of tests that launches all.

    KILN_KERNEL_COVERAGE=coverage.json TRITON_INTERPRET=1 \
        python -m pytest -p scripts.gpu.kernel_coverage tests/kernels/test_triton_*.py
    python scripts/gpu/kernel_coverage.py coverage.json …    # the tests, one a line

In Triton's interpreter nothing is compiled and no GPU is needed; on a GPU (`-m gpu` and no
TRITON_INTERPRET) it works too. The choice takes, for each kernel, the quickest tests that launch it.
Kernels that no test launched are named on standard error, and the exit status is 1.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
_PACKAGES = ("kiln_nn", "kiln_engine")
# Functions that are launched; the other @triton.jit functions become part of them.
_ENTRY_SUFFIX = "_kernel"
_TESTS_PER_KERNEL = 2
# Of a test with many parameters, so many are run, spread evenly over them.
_CASES_PER_TEST = 3
# Recording a graph needs the caching allocator, which is switched off to see every byte out of bounds.
_UNFIT = ("graph",)


class KernelCoverage:
    """Notes, for each test, the kernels it launched and the seconds it took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._launched: set[str] = set()
        self.tests: dict[str, dict[str, Any]] = {}

    def watch_launches(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        self._watch(JITFunction)
        self._watch(InterpretedFunction)

    def _watch(self, kind: Any) -> None:
        launch, launched = kind.run, self._launched

        def watched(kernel: Any, *args: Any, **options: Any) -> Any:
            # Called under the class's name, so that tests may put something else in its place.
            launched.add(kernel.fn.__name__)
            return launch(kernel, *args, **options)

        kind.run = watched

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out most cases of tests that have many: a kernel's code does not depend on them all."""
        by_test: dict[str, list[pytest.Item]] = {}
        for item in items:
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
        kept = [item for cases in by_test.values() for item in spread(cases, _CASES_PER_TEST)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._launched.clear()
        started_s = time.perf_counter()
        yield
        self.tests[item.nodeid] = {
            "kernels": sorted(self._launched),
            "seconds": time.perf_counter() - started_s,
        }
        self._path.write_text(json.dumps(self.tests, indent=1))  # also where the run is cut short


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("KILN_KERNEL_COVERAGE")
    if path:
        coverage = KernelCoverage(Path(path))
        coverage.watch_launches()
        config.pluginmanager.register(coverage)


def spread(cases: Sequence[T], count: int) -> list[T]:
    """At most `count` of the cases, the first and the last among them."""
    if len(cases) <= count:
        return list(cases)
    return [cases[round(i * (len(cases) - 1) / (count - 1))] for i in range(count)]


def entry_kernels() -> set[str]:
    """Names of all kernels in Kiln's packages, read from their sources."""
    names = set()
    for package_name in _PACKAGES:
        spec = importlib.util.find_spec(package_name)
        assert spec is not None, package_name
        assert spec.origin is not None, package_name
        for path in Path(spec.origin).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and "jit" in map(_decorator_name, node.decorator_list):
                    names.add(node.name)
    return {name for name in names if name.endswith(_ENTRY_SUFFIX)}


def _decorator_name(decorator: ast.expr) -> str:
    """Of `@triton.jit` and of `@triton.jit(…)`: jit."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def choose_tests(tests: Mapping[str, Mapping[str, Any]], kernels: set[str]) -> tuple[list[str], set[str]]:
    """The tests to run, and the kernels that none of them launches."""
    chosen: set[str] = set()
    missing: set[str] = set()
    for kernel in sorted(kernels):
        able = [
            name
            for name, test in tests.items()
            if kernel in test["kernels"] and not any(word in name.lower() for word in _UNFIT)
        ]
        quickest = sorted(able, key=lambda name: tests[name]["seconds"])[:_TESTS_PER_KERNEL]
        chosen.update(quickest)
        if not quickest:
            missing.add(kernel)
    return sorted(chosen), missing


def main() -> None:
    tests: dict[str, dict[str, Any]] = {}
    among: set[str] | None = None
    paths = sys.argv[1:]
    if paths[:1] == ["--among"]:  # names of tests, one a line
        among, paths = set(Path(paths[1]).read_text().splitlines()), paths[2:]
    for path in paths:
        tests |= json.loads(Path(path).read_text())
    if among is not None:
        tests = {name: test for name, test in tests.items() if name in among}
    chosen, missing = choose_tests(tests, entry_kernels())
    print("\n".join(chosen))
    if missing:
        print(f"no test launched: {', '.join(sorted(missing))}", file=sys.stderr)
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
