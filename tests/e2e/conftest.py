"""One stack for all end-to-end tests that leave it healthy."""

import pytest

from tests.support.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    with Stack(tmp_path_factory.mktemp("stack"), "--served-model-name", "Qwen/Qwen3.5-4B") as running:
        yield running
