"""Collect what tests prove, from their `proves` marks, and write docs/what_is_tested.md.

A value of a mark may name parameters of the test, or compute a value from them:

    @pytest.mark.proves("read", "merge", variant="dora", layer="{site}")
    @pytest.mark.proves("loss", task="causal_lm", rows="text", model=lambda kind, **_: FAMILY[kind])

`against="PEFT"` names the independent implementation that a test compares with. The tables contain
all tests that pytest collects, with every parameter; nothing is written by hand.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
LAYERS = (
    "Linear", "Conv1D", "Conv2d", "grouped Conv2d", "Conv1d", "Embedding", "tied Embedding",
    "experts", "transposed experts",
)  # fmt: skip
BASES = ("plain", "int8", "nf4")
VARIANTS = (
    "lora", "dropout", "rslora", "patterns", "bias of adapted modules", "all biases", "pissa",
    "olora", "olora with patterns", "orthogonal", "eva", "loftq", "mica", "dora",
    "dora with patterns", "loha", "lokr", "rows of tokens", "bitfit", "full", "head alone",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The rows and columns of a table."""

    title: str
    keys: tuple[str, ...]
    """Keywords of the mark that identify a row; the first one gives the section."""
    columns: dict[str, str]
    """What a test in a column proves, by the head of the column."""
    orders: tuple[Sequence[str], ...]
    """The order of the values of each key; other values follow."""
    intro: str


ADAPTERS = Table(
    "Adapters",
    ("variant", "layer", "base"),
    {
        "train": "step 0 equals the base; only trained parameters get gradients; gradients and "
        "losses equal those of the reference",
        "write": "a saved adapter computes the same after it is loaded",
        "read": "an adapter folder computes the same here as in the tool that wrote it",
        "merge": "the merged model computes the same, or has the same weights",
        "export": "the exported files, read in the way of their program, compute the same",
        "resume": "a run that was stopped and resumed is the whole run, bit for bit",
    },
    (VARIANTS, LAYERS, BASES),
    "`layer` is the kind of layer that the adapter is attached to; `experts` are three-dimensional "
    "parameters. A run or an export concerns a whole model, so it is in the row of that model's "
    "layers.",
)
TASKS = Table(
    "Tasks",
    ("task", "rows", "model", "base"),
    {
        "loss": "the loss equals that of the reference",
        "split": "any split of a batch into micro-batches gives the same loss and gradients, "
        "within 1e-5 of the largest",
        "alone": "a row has the same loss and scores alone and in a batch with longer rows, within "
        "rounding",
        "save": "saved and loaded: every tensor bit for bit, and the same outcomes",
        "merge": "the merged model has the same outcomes",
        "predict": "`lora predict` gives a row the same answer alone and in a batch",
        "init": "`lora init` writes a valid recipe for such rows, with exactly this task",
        "resume": "a run that was stopped and resumed is the whole run, bit for bit",
    },
    ((), (), (), BASES),
    "`rows` is the content of a row of the data.",
)


@dataclass(frozen=True)
class Claim:
    """One thing that one test proves in one row of a table."""

    row: tuple[str, ...]
    what: str
    test: str
    """File and function, without parameters."""
    against: str


class Collector:
    """A pytest plugin that keeps all collected tests, before any are deselected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []
        self.problems: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep all tests, including those that an option would deselect."""
        self.items = list(items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the errors of collection."""
        if report.outcome != "passed":
            self.problems.append(f"{report.nodeid} {report.outcome}: {report.longrepr}")


def claims() -> dict[str, list[Claim]]:
    """Return what marked tests prove, by the title of the table.

    Raises:
        RuntimeError: If a file cannot be collected; a package may be missing.
    """
    files = [
        str(file)
        for file in sorted(TESTS.rglob("test_*.py"))
        if "mark.proves(" in file.read_text(encoding="utf-8")
    ]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(TESTS))  # as conftest.py does, which is not loaded here
    collector = Collector()
    # the fixtures of conftest.py would change this process, and collecting does not need them
    options = ["--collect-only", "--noconftest", "-p", "no:terminal", "-p", "no:cacheprovider",
               "-p", "no:faulthandler", "-p", "no:logging", "--capture=no"]  # fmt: skip
    code = pytest.main([*options, *files], plugins=[collector])
    if code != pytest.ExitCode.OK or collector.problems:
        raise RuntimeError(f"pytest cannot collect the tests ({code!r}): {collector.problems}")
    found: dict[str, list[Claim]] = {table.title: [] for table in (ADAPTERS, TASKS)}
    for item in collector.items:
        for mark in item.iter_markers("proves"):
            table = ADAPTERS if "variant" in mark.kwargs else TASKS
            found[table.title] += _claims_of(item, mark, table)
    return found


def _claims_of(item: pytest.Item, mark: pytest.Mark, table: Table) -> Iterator[Claim]:
    values = dict(mark.kwargs)
    against = values.pop("against", "")
    values.setdefault("base", "plain")
    if values.keys() != set(table.keys) or not mark.args:
        raise RuntimeError(f"{item.nodeid}: `proves` names {sorted(values)}, not {table.keys}")
    callspec = getattr(item, "callspec", None)
    parameters = {} if callspec is None else callspec.params
    proved = [what for value in mark.args for what in _values_of(value, parameters)]
    if unknown := set(proved) - table.columns.keys():
        raise RuntimeError(f"{item.nodeid}: `proves` has no {sorted(unknown)}")
    rows = itertools.product(*(_values_of(values[key], parameters) for key in table.keys))
    test = item.nodeid.partition("[")[0]
    test = test if test.startswith("tests/") else f"tests/{test}"
    for row, what in itertools.product(rows, proved):
        yield Claim(row, what, test, against)


def _values_of(value: str | Callable[..., Any], parameters: dict[str, Any]) -> tuple[str, ...]:
    found = value.format(**parameters) if isinstance(value, str) else value(**parameters)
    return (found,) if isinstance(found, str) else tuple(found)


# ------------------------------------------------------------------------------------- the page


def page(note: str) -> str:
    """Return the text of docs/what_is_tested.md."""
    found = claims()
    parts = [
        note,
        "# What is tested\n",
        "Each number is a test: they are listed after each table. A number in **bold** is a "
        "comparison with an independent implementation, which the list names. Cells without a "
        "test are empty. The tables are generated from the tests that pytest collects, and a test "
        "checks that this page is up to date. `pytest FILE -k FUNCTION` runs a single test.\n",
    ]
    for table in (ADAPTERS, TASKS):
        parts += _table(table, found[table.title])
    return "\n".join(parts)


def _table(table: Table, found: list[Claim]) -> Iterator[str]:
    numbers = {test: i + 1 for i, test in enumerate(sorted({claim.test for claim in found}))}
    cells: dict[tuple[str, ...], dict[str, dict[int, bool]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for claim in found:
        cell = cells[claim.row][claim.what]
        number = numbers[claim.test]
        cell[number] = cell.get(number, False) or bool(claim.against)
    yield f"## {table.title}\n"
    yield table.intro + "\n"
    yield "\n".join(f"- **{head}**: {meaning}" for head, meaning in table.columns.items()) + "\n"
    heads = [*table.keys[1:], *table.columns]

    def place(row: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
        return tuple(
            (list(order).index(value) if value in order else len(order), value)
            for value, order in zip(row, table.orders, strict=True)
        )

    rows = sorted(cells, key=place)
    for section, members in itertools.groupby(rows, key=lambda row: row[0]):
        yield f"### {section}\n"
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in members:
            filled = [_cell(cells[row][column]) for column in table.columns]
            lines.append("| " + " | ".join([*row[1:], *filled]) + " |")
        yield "\n".join(lines) + "\n"
    yield f"### Tests of {table.title.lower()}\n"
    against: dict[str, set[str]] = defaultdict(set)
    for claim in found:
        against[claim.test] |= {claim.against} - {""}
    lines = []
    for test, number in numbers.items():
        file, _, function = test.partition("::")
        said = function.removeprefix("test_").replace("_", " ")
        compared = f" (compared with {', '.join(sorted(against[test]))})" if against[test] else ""
        lines.append(f"{number}. `{file}` `{function}`: {said}{compared}")
    yield "\n".join(lines) + "\n"


def _cell(numbers: dict[int, bool]) -> str:
    said = (f"**{n}**" if independent else str(n) for n, independent in sorted(numbers.items()))
    return ", ".join(said)
