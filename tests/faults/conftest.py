"""What the tests share that end runs: where runs are forked from, and one that was left alone."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killing import Kill, Nursery, Whole, measure


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


@pytest.fixture(scope="session")
def killed(
    nest: Nursery, whole: Whole, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Path]:
    """Return a function that copies the output folder of a run killed as it saved step 12."""
    out = tmp_path_factory.mktemp("killed") / "out"
    assert nest.run(whole.recipe, out, kill=Kill(0.0, "save", 4)) == [-signal.SIGKILL]
    return lambda folder: Path(shutil.copytree(out, folder))
