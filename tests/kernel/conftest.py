"""The balancer is loaded once for all tests here; each begins with empty tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loaded import Loaded, loaded


@pytest.fixture(scope="session")
def program_under_test() -> Iterator[Loaded]:
    with loaded() as balancer:
        yield balancer


@pytest.fixture
def balancer(program_under_test: Loaded) -> Loaded:
    program_under_test.clear()
    return program_under_test
