"""Columns that are nearly something: `lora init` says which cells are in the way, or what to do."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from drafting import Init, classification, labelled, lines, said, table, texts

from lora_cli.errors import LoraError
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.recipe import load_recipe
from lora_cli.recipe_draft import draft_recipe

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


# ---------------------------------------------------------------------------- several labels a cell

QUEUES = ["請求", "配送", "返品", "解約"]


@pytest.mark.parametrize("rows", [range(0, 60, 3), [5]], ids=["often", "once"])
@pytest.mark.parametrize(
    ("between", "separator"),
    [
        ("・", "・"), ("･", "・"), ("·", "·"), ("／", "/"), (" / ", "/"), ("＆", "&"), ("、", "、"),
        ("，", ","), ("；", ";"), ("｜", "|"), ("＋", "+"), ("\u3000", "\u3000"), ("と", "と"),
        (" and ", " and "),
    ],
)  # fmt: skip
@pytest.mark.slow_after(3)
def test_signs_between_labels(init: Init, between: str, separator: str, rows: Any) -> None:
    labels = [QUEUES[i % 4] for i in range(60)]
    for i in rows:
        labels[i] = between.join([QUEUES[i % 4], QUEUES[(i + 1) % 4]])
    recipe = init("rows.csv", table(["text", "label"], list(zip(texts(60), labels, strict=True))))
    assert recipe.task.problem == "multi_label"
    assert recipe.task.label_separator == separator
    assert recipe.task.labels == sorted(QUEUES)


@pytest.mark.parametrize(
    "labels", [["スター・ウォーズ", "ハリー・ポッター"], ["R&B", "R&D", "pop"], ["非と", "是"]]
)
def test_signs_inside_a_label(init: Init, labels: list[str]) -> None:
    recipe = init("rows.csv", table(["text", "label"], labelled(40, labels)))
    assert said(recipe) == classification("text", "label", sorted(labels))


@pytest.mark.parametrize("least", [1, 2])
def test_numbers_of_labels_are_no_fractions(init: Init, least: int) -> None:
    draw = random.Random(0)
    ids = [draw.sample(range(28), draw.randint(least, 2)) for _ in range(200)]
    cells = [",".join(map(str, some)) for some in ids]
    recipe = init("rows.csv", table(["text", "labels"], list(zip(texts(200), cells, strict=True))))
    assert (recipe.task.problem, recipe.task.label_separator) == ("multi_label", ",")
    assert recipe.task.labels == list(range(28))


@pytest.mark.parametrize("digits", [1, 2])
def test_fractions_are_no_numbers_of_labels(init: Init, digits: int) -> None:
    draw = random.Random(0)
    cells = [f"{draw.uniform(0, 5):.{digits}f}".replace(".", ",") for _ in range(200)]
    cells[::9] = ["3"] * len(cells[::9])
    recipe = init("rows.csv", table(["text", "score"], list(zip(texts(200), cells, strict=True))))
    assert recipe.task.problem == "regression"


# --------------------------------------------------------------------------------- inside objects

NESTED: list[tuple[dict[str, Any], str, str]] = [
    ({"context": "x", "answers": {"text": ["film"], "answer_start": [3]}}, "the answers stand",
     "{instruction: .question, input: .context, output: .answers.text[0]}"),
    ({"answers": [{"text": "film"}]}, "the answers stand", "output: .answers[0].text}"),
    ({"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}, "its choices",
     '.question + "\\n" + (.choices.text | join("\\n"))'),
    ({"choices": ["a film", "a play"], "answer": 1}, "its choices", ".choices[$key | tonumber]"),
    ({"writer": {"joy": 1, "anger": 0}, "reader": {"joy": 2, "anger": 0}}, "`writer` holds objects",
     ". + {label: .writer.joy}"),
    ({"annotations": [{"by": 1, "label": "a"}]}, "holds objects", ".annotations[0].label"),
]  # fmt: skip


@pytest.mark.parametrize("model", ["encoder", "llama"])
@pytest.mark.parametrize(("more", "what", "command"), NESTED, ids=str)
def test_what_stands_inside_objects_is_named(
    init: Init, more: dict[str, Any], what: str, command: str, model: str
) -> None:
    rows = [{"question": text, **more} for text in texts(40)]
    for i, row in enumerate(rows):
        varied = {"context": row["question"][::-1], "answerKey": "AB"[i % 2], "answer": i % 2}
        row.update({key: value for key, value in varied.items() if key in row})
    with pytest.raises(LoraError, match=what) as caught:
        init("rows.jsonl", lines(rows), model)
    assert command in (caught.value.problems[0].hint or "")


def test_objects_about_a_text_are_left_out(init: Init) -> None:
    rows = [{"text": text, "meta": {"source": 1, "id": 2}} for text in texts(40)]
    assert said(init("rows.jsonl", lines(rows), "llama"))["text_column"] == "text"


# ----------------------------------------------------------------------------- answers to be ranked

PAIR = ["a long answer of many words", "another answer that has more words"]
RANKED: list[dict[str, Any]] = [
    {"responses": PAIR, "scores": [0.1, 0.9]},
    {"responses": json.dumps(PAIR), "scores": json.dumps([0.1, 0.9])},
    {"responses": PAIR},
    {"candidates": [*PAIR, "a"], "ranks": [1, 2, 3]},
    {"completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2}]},
    {"model_outputs": PAIR, "human_ratings": [1, 5]},
    {"passages": PAIR, "scores": [0.1, 0.9]},
]


@pytest.mark.parametrize("model", ["encoder", "llama"])
@pytest.mark.parametrize("more", RANKED, ids=str)
def test_answers_to_be_ranked_are_no_labels(init: Init, more: dict[str, Any], model: str) -> None:
    rows = lines([{"prompt": text, **more} for text in texts(40)])
    column = next(iter(more))
    with pytest.raises(LoraError, match=f"several answers in `{column}`.* ranked, which no task"):
        init("rows.jsonl", rows, model)


def test_lists_beside_another_label_are_left_out(init: Init) -> None:
    rows = [{"text": t, "label": "ab"[i % 2], "outputs": PAIR} for i, t in enumerate(texts(40))]
    recipe = init("rows.jsonl", lines(rows))
    assert said(recipe) == classification("text", "label", ["a", "b"])


@pytest.mark.parametrize("column", ["responses", "scores"])
def test_a_recipe_that_learns_such_a_list_is_rejected(
    column: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"prompt": text, **RANKED[0]} for text in texts(8)]
    (tmp_path / "rows.jsonl").write_text(lines(rows), encoding="utf-8")
    task = {"text_column": "prompt", "label_column": column, "problem": "multi_label"}
    file = tiny.recipe(bases["encoder"], tmp_path, task=task, data={"path": "rows.jsonl"})
    with pytest.raises(LoraError, match=r"8 of 8 train rows .* several answers in `responses`"):
        check_recipe(load_recipe(file))


def test_a_short_table_is_counted_in_words(bases: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    for count, words in ((2, "no row has more than"), (120, "99 of 100 rows have at most")):
        source.write_text(table(["text", "label"], labelled(count, ["a", "b"])), encoding="utf-8")
        draft = draft_recipe(source, str(bases["encoder"]), tmp_path / "recipe.yaml")
        assert draft.why["task.max_length"].startswith(words)
        assert f"{count} rows, 2 columns" in dict(draft.findings)["file"]
    source.write_text("text\na long text of many words\n", encoding="utf-8")
    draft = draft_recipe(source, str(bases["llama"]), tmp_path / "recipe.yaml")
    assert "1 row, 1 column" in dict(draft.findings)["file"]


def test_letters_that_the_tokenizer_does_not_know_are_reported(tmp_path: Path) -> None:
    source, base = tmp_path / "rows.csv", tiny.save_encoder(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    tiny.wordpiece().save_pretrained(base)
    for words, share in (
        (tiny.CORPUS * 5, 0),
        (["商品を返品したいです", "荷物が届きません"] * 20, 1),
    ):
        rows = [[text, "ab"[i % 2]] for i, text in enumerate(words)]
        source.write_text(table(["text", "label"], rows), encoding="utf-8")
        draft = draft_recipe(source, str(base), tmp_path / "recipe.yaml")
        assert ("unknown" in dict(draft.findings)) == bool(share)
    assert "of the tokens of the texts are `[UNK]`" in dict(draft.findings)["unknown"]
