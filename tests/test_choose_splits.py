"""Which rows `lora init` holds out: the author's own splits where they are honest, else a draw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from drafting import Init, labelled, lines, table, texts
from transformers import AutoTokenizer

from lora_cli.data.load_rows import load_rows
from lora_cli.recipe.spec import HeldOutSpec

HEADER = ["text", "label"]
TRAIN = labelled(60, ["good", "bad"])
DEV = [[f"dev {text}", label] for text, label in TRAIN[:12]]
TEST = [[f"test {text}", label] for text, label in TRAIN[:14]]


def comments(folder: Path) -> str:
    return (folder / "recipe.yaml").read_text(encoding="utf-8")


def sizes(recipe: Any) -> dict[str, int]:
    return {name: len(rows) for name, rows in load_rows(recipe).items()}


# ---------------------------------------------------------------------------- files beside train


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("train", "dev", "test"),
    [
        ("train.csv", "dev.csv", "test.csv"),
        ("train.csv", "validation.csv", "test_labelled.csv"),
        ("My-Train-v2.csv", "My-valid-v2.csv", "My-TEST-v2.csv"),
        ("training.csv", "val.csv", "testing.csv"),
        ("news_train.csv", "news_dev.csv", "news_test.csv"),
    ],
)
def test_files_beside_train(train: str, dev: str, test: str, init: Init, tmp_path: Path) -> None:
    (tmp_path / dev).write_text(table(HEADER, DEV))
    (tmp_path / test).write_text(table(HEADER, TEST))
    recipe = init(train, table(HEADER, TRAIN))
    assert [Path(p).name for p in (recipe.data.validation, recipe.data.test)] == [dev, test]
    assert sizes(recipe) == {"train": 60, "validation": 12, "test": 14}
    assert "next to the file: 12 rows" in comments(tmp_path)


@pytest.mark.parametrize("name", ["rows.csv", "sentences_train.csv", "retraining.csv"])
def test_files_of_other_sets_are_let_alone(name: str, init: Init, tmp_path: Path) -> None:
    for other in ("dev.csv", "test.csv", "strain.csv", "mytest.csv"):
        (tmp_path / other).write_text(table(HEADER, DEV))
    assert isinstance(init(name, table(HEADER, TRAIN)).data.validation, HeldOutSpec)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (table(["index", "text"], [[i, row[0]] for i, row in enumerate(DEV)]),
         "it has no column `label`"),
        (table(HEADER, [[text, ""] for text, _ in DEV]), "12 of 12 rows lack a text or a label"),
        (table(HEADER, [[text, "-1"] for text, _ in DEV]), "train has no label `-1`"),
        (table(HEADER, TRAIN[:3] + DEV), "3 of 15 texts also occur in train"),
        (table(HEADER, DEV, ";"), ""),
        ("text,label\n", "it has no rows"),
        ("text,label\na,b,c\n", "3 fields where there are 2 columns"),
    ],
)  # fmt: skip
def test_a_test_that_measures_nothing_is_refused(
    content: str, why: str, init: Init, tmp_path: Path
) -> None:
    (tmp_path / "dev.csv").write_text(content)
    recipe = init("train.csv", table(HEADER, TRAIN))
    assert isinstance(recipe.data.validation, HeldOutSpec)
    assert f"dev.csv next to it is not used: {why}" in comments(tmp_path)


def test_the_held_out_rows_are_measured_too(init: Init, tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text(table(HEADER, [[f"{t} {t}", label] for t, label in DEV]))
    recipe = init("train.csv", table(HEADER, TRAIN))
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    train, dev = (
        max(len(tokenizer(row["text"])["input_ids"]) for row in rows)
        for rows in load_rows(recipe).values()
    )
    assert train + 32 < dev <= recipe.task.max_length < dev + 32


def test_the_rest_is_drawn(init: Init, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(table(HEADER, TEST))
    recipe = init("train.csv", table(HEADER, TRAIN))
    assert sizes(recipe) == {"train": 48, "validation": 12, "test": 14}


def test_compressed_files_of_no_known_kind(init: Init, tmp_path: Path) -> None:
    import gzip

    parts = {"train": TRAIN, "val": DEV, "test_2016": TEST, "test_2017": TEST[:5]}
    for name, rows in parts.items():
        content = "".join(f"{text}.\n" for text, _ in rows)
        (tmp_path / f"{name}.en.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "val.de.gz").write_bytes(gzip.compress(b"etwas\n"))
    recipe = init("", tmp_path / "train.en.gz", "llama")
    assert sizes(recipe) == {"train": 60, "validation": 12, "test": 14}
    assert "also there: test_2017.en.gz" in comments(tmp_path)


# ------------------------------------------------------------------------------- a split column


def marked(marks: list[str], rows: list[list[Any]] = TRAIN) -> str:
    header = ["text", "label", "subset"]
    return table(header, [[*row, marks[i % len(marks)]] for i, row in enumerate(rows)])


def test_a_split_column(init: Init) -> None:
    recipe = init("rows.csv", marked(["train", "train", "train", "valid", "test"]))
    data = recipe.data
    assert (data.split_column, data.train) == ("subset", "train")
    assert (data.validation, data.test) == ("valid", "test")
    assert sizes(recipe) == {"train": 36, "validation": 12, "test": 12}


def test_a_split_column_of_other_words(init: Init) -> None:
    recipe = init("rows.csv", marked(["TRAINING", "TRAINING", "TRAINING", "Test"]))
    assert (recipe.data.train, recipe.data.test) == ("TRAINING", "Test")
    assert sizes(recipe) == {"train": 36, "validation": 9, "test": 15}
    assert recipe.task.label_column == "label"


def test_rows_of_a_test_without_labels_are_not_used(init: Init, tmp_path: Path) -> None:
    rows = [[text, label if i % 4 else ""] for i, (text, label) in enumerate(TRAIN)]
    recipe = init("rows.csv", marked(["test", "train", "train", "dev"], rows))
    assert (recipe.data.validation, recipe.data.test) == ("dev", None)
    assert sizes(recipe) == {"train": 30, "validation": 15}
    why = "the rows that `subset` calls test are not used: 15 of 15 rows lack a text or a label"
    assert why in comments(tmp_path)


def test_a_split_column_that_leaks_is_not_used(init: Init, tmp_path: Path) -> None:
    twice = [row for row in TRAIN for _ in range(2)]
    recipe = init("rows.csv", marked(["train", "test"], twice))
    assert recipe.data.split_column is None
    rows = load_rows(recipe)
    sides = [{row["text"] for row in split} for split in rows.values()]
    assert not sides[0] & sides[1]
    assert "calls test are not used: 60 of 60 texts also occur in train" in comments(tmp_path)


# ------------------------------------------------------------------------------------ drawn rows


def test_phrases_of_sentences_are_held_out_with_them(init: Init, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = []
    for i, (text, label) in enumerate(TRAIN):
        words = f"{text} {i}".split()
        start = draw.randrange(len(words) - 3)
        rows += [[" ".join(words), label], [" ".join(words[start : start + 4]), label]]
    recipe = init("rows.csv", table(HEADER, rows))
    assert recipe.data.validation.disjoint == "substring"
    assert "% of the texts stand inside others: they go together" in comments(tmp_path)
    whole = init_again(init, tmp_path, rows[::2])
    assert whole.data.validation.disjoint == "exact"


def init_again(init: Init, folder: Path, rows: list[list[Any]]) -> Any:
    (folder / "recipe.yaml").unlink()
    return init("rows.csv", table(HEADER, rows))


@pytest.mark.parametrize("labels", ["ab", "abcdefghijkl"])
def test_a_few_texts_in_many_rows_can_be_divided(init: Init, tmp_path: Path, labels: str) -> None:
    spoken = [text for text, _ in TRAIN[:12]]
    rows = [[spoken[i % 12], labels[i % 12 % len(labels)]] for i in range(240)]
    recipe = init("rows.csv", table(HEADER, rows))
    found = load_rows(recipe)
    assert {len(split) % 20 for split in found.values()} == {0}
    assert 0 < len(found["validation"]) < len(found["train"])
    if len(labels) > 2:
        assert "not stratified: the rarest label has one text only" in comments(tmp_path)


def test_a_group_that_holds_nearly_all_leaves_nothing_out(init: Init, tmp_path: Path) -> None:
    same = [
        {"customer_id": "all", "text": t, "label": "ab"[i % 2]} for i, t in enumerate(texts(99))
    ]
    for i, row in enumerate(same[:9]):
        row["customer_id"] = f"c{i}"
    for a, b in zip(same[:9], same[9:18], strict=True):
        b["text"] = a["text"]  # and each of the others is joined to it by a text
    recipe = init("rows.jsonl", lines(same))
    assert recipe.data.validation is None
    assert "leaves one side empty" in comments(tmp_path)


def test_a_group_stays_whole_though_texts_are_phrases(init: Init) -> None:
    rows = [
        {"conversation_id": f"c{i % 20}", "text": text, "label": "ab"[i % 2]}
        for i, text in enumerate(texts(60))
    ]
    held = init("rows.jsonl", lines(rows)).data.validation
    assert (held.group_by, held.disjoint) == ("conversation_id", "exact")
