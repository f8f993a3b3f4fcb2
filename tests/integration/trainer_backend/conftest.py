"""One tiny served model for all tests of the backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.training import ServedModel, served_model


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with served_model(tmp_path_factory.mktemp("trainer")) as model:
        yield model
