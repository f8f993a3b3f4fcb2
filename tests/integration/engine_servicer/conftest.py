"""Every engine here serves one step at a time, and one step ahead."""

import pytest


@pytest.fixture(params=["0", "1"], ids=["in_turn", "run_ahead"], autouse=True)
def run_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILN_ENGINE_RUN_AHEAD", request.param)
