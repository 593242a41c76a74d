"""A running suite for tests that leave it whole, and places for suites of one's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.suite import Client, Suite, new_suite


@pytest.fixture(scope="session")
def running_suite() -> Iterator[Suite]:
    """A suite with the simulated engine, shared: whoever uses it leaves it whole."""
    with new_suite() as suite:
        suite.start()
        yield suite


@pytest.fixture
def client(running_suite: Suite) -> Client:
    """A client of the shared suite."""
    return Client(running_suite)


@pytest.fixture
def suite() -> Iterator[Suite]:
    """A suite of the test's own, not started yet."""
    with new_suite() as found:
        yield found
