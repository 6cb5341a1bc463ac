"""What the tests share that end runs: where runs are forked from, and one that was left alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from killing import Nursery, Whole, measure


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start the process that runs are forked from, before a test computes something here."""
    if any("nest" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[NEST] = Nursery().__enter__()


NEST = pytest.StashKey[Nursery]()


@pytest.fixture(scope="session")
def nest(pytestconfig: pytest.Config) -> Iterator[Nursery]:
    nursery = pytestconfig.stash[NEST]
    yield nursery
    nursery.__exit__(None, None, None)


@pytest.fixture(scope="session")
def wholes(nest: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Return a function that gives one of `RUNS`, which is run once for all tests."""
    return functools.cache(lambda name: measure(nest, tmp_path_factory.mktemp("whole"), name))


@pytest.fixture(scope="session")
def whole(wholes: Callable[[str], Whole]) -> Whole:
    return wholes("accumulation, dropout")
