"""What the tests share that end runs: where runs are forked from, and one that was left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from killing import Nursery, Whole, measure


@pytest.fixture(scope="session")
def nest() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def whole(nest: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    recipe, _, _ = measure(nest, folder, "accumulation, dropout")
    return Whole(recipe, folder / "whole")
