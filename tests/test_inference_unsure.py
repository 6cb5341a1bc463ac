"""Columns that are nearly something: `lora init` says which cells are in the way, or what to do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from drafting import Init, classification, labelled, said, table, texts

from lora_cli.errors import LoraError

STRAYS = ["nan", "1e40", "1.5k", "12万", "N/A", "null", "inf", "?", "1.2.3", "3/5", "#REF!"]


def scored(stray: str, fractions: bool) -> str:
    """Return a table of 60 texts with scores, of which the 18th is something else."""
    draw = random.Random(0)
    scores = [str(draw.randint(1, 5)) for _ in range(60)]
    if fractions:
        scores = [f"{draw.uniform(0, 5):.2f}" for _ in scores]
    scores[17] = stray
    return table(["text", "score"], list(zip(texts(60), scores, strict=True)))


@pytest.mark.parametrize("fractions", [True, False])
@pytest.mark.parametrize("stray", STRAYS)
def test_a_number_among_numbers_that_is_none(init: Init, stray: str, fractions: bool) -> None:
    with pytest.raises(LoraError) as caught:
        init("rows.csv", scored(stray, fractions))
    problem = caught.value.problems[0]
    assert problem.what == f"`score` holds numbers, except in 1 cell: `{stray}` in row 18"
    assert problem.at == "rows.csv, row 18"
    assert "write a number there" in (problem.hint or "")


def test_a_word_among_few_whole_numbers_may_be_a_label(init: Init) -> None:
    labels = ["1", "2", "3", "4", "5", "seven"]
    assert said(init("rows.csv", scored("seven", False))) == classification("text", "score", labels)
    with pytest.raises(LoraError, match="holds numbers, except in 1 cell: `seven` in row 18"):
        init("more.csv", scored("seven", True))


def test_hints_name_no_option_that_init_lacks(init: Init, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = labelled(20, ["a", "b"])
    texts_, labels = (list(column) for column in zip(*rows, strict=True))
    columns = [pa.array(texts_), pa.array(labels), pa.array(labels)]
    names = ["text", "label", "label"]
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "rows.parquet")
    (tmp_path / "short.csv").write_text("text,label\na film\n", encoding="utf-8")
    for name, key in (
        ("rows.parquet", 'data.format.columns: ["text", "label", "label_3"]'),
        ("short.csv", "data.format.header: false"),
    ):
        with pytest.raises(LoraError) as caught:
            init(name, tmp_path / name)
        hint = caught.value.problems[0].hint or ""
        assert "`--set " not in hint.replace("`lora init` has no `--set`", "")
        if "recipe" in hint:
            assert f"`{key}` in a recipe" in hint
