"""The faults that messages speak of, each made for real: a name, and what meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from world import Printed, World


@dataclass(frozen=True)
class Case:
    """A fault, and what makes and meets it."""

    area: str
    name: str
    run: Callable[[World], Printed]


CASES: list[Case] = []


def case(area: str, name: str) -> Callable[[Callable[[World], Printed]], None]:
    def add(run: Callable[[World], Printed]) -> None:
        CASES.append(Case(area, name, run))

    return add
