"""CoNLL files in their dialects: words, columns, comments and errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_cli.data.conll import is_conll, read_conll
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

SENTENCES = [{"tokens": ["EU", "rejects", "#"], "tags": ["B-ORG", "O", "O"]},
             {"tokens": ["Ida"], "tags": ["B-PER"]}]  # fmt: skip
FILES = {
    "tabs": "EU\tB-ORG\nrejects\tO\n#\tO\n\nIda\tB-PER\n",
    "spaces": "EU B-ORG\nrejects  O\n# O\n\nIda B-PER",
    "windows": "EU\tB-ORG\r\nrejects\tO\r\n#\tO\r\n \t\r\nIda\tB-PER\r\n",
    "a mark, and blank lines": "\ufeff\n\nEU B-ORG\nrejects O\n# O\n   \n\n\nIda B-PER\n\n\n",
    "documents": "-DOCSTART- O\n\nEU B-ORG\nrejects O\n# O\n-DOCSTART- O\n\nIda B-PER\n",
    "comments": "# sent_id = 1\n# text = EU\n#\nEU B-ORG\nrejects O\n# O\n\n# x = 2\nIda B-PER\n",
    "a comment first": "# a title of words\nEU\tB-ORG\nrejects\tO\n#\tO\n\nIda\tB-PER\n",
    "a header": "word\ttag\nEU\tB-ORG\nrejects\tO\n#\tO\n\nIda\tB-PER\n",
    "comments of several marks": "## 1\n\n### a title\nEU B-ORG\nrejects O\n# O\n\nIda B-PER\n",
    "comments of MultiCoNER": "# id 8f-3a\tdomain=en\nEU _ _ B-ORG\nrejects _ _ O\n# _ _ O\n\n"
    "# id 9\tdomain=en\nIda _ _ B-PER\n",
    "some lines with spaces": "EU\tB-ORG\nrejects O\n#\tO\n\nIda B-PER\n",
}


@pytest.mark.parametrize("name", FILES)
def test_conll_files_are_read_in_their_dialects(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.conll"
    file.write_text(FILES[name], encoding="utf-8", newline="")
    rows = list(read_conll(file, FormatSpec()))
    read = [{k: v for k, v in (row.columns or {}).items() if k[0] == "t"} for row in rows]
    assert read == SENTENCES
    assert not any(row.error for row in rows)


def test_columns_of_conll_files_have_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.conll"
    file.write_text("EU NNP B-NP B-ORG\n\nIda NN B-NP B-PER\n")
    first = next(iter(read_conll(file, FormatSpec())))
    columns = {"tokens": ["EU"], "column_2": ["NNP"], "column_3": ["B-NP"], "tags": ["B-ORG"]}
    assert first.columns == columns
    named = FormatSpec(columns=["word", "pos", "chunk", "ner"])
    assert list(next(iter(read_conll(file, named))).columns or ()) == named.columns
    with pytest.raises(LoraError, match=r"names 2 columns, and\s+the file has 4"):
        list(read_conll(file, FormatSpec(columns=["a", "b"])))
    file.write_text("EU\n\nIda\n")
    assert [row.columns for row in read_conll(file, FormatSpec())] == [
        {"tokens": ["EU"]}, {"tokens": ["Ida"]}
    ]  # fmt: skip


def test_words_that_look_like_comments_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.conll"
    file.write_text("##\tO\nEU\tB-ORG\n\n###\tO\nEU\tB-ORG\n\n#\tO\n")
    words = [(row.columns or {})["tokens"] for row in read_conll(file, FormatSpec())]
    assert words == [["##", "EU"], ["###", "EU"], ["#"]]


@pytest.mark.parametrize("start", [0, 1])
def test_a_column_of_word_numbers_is_not_read_as_words(start: int, tmp_path: Path) -> None:
    file, tagged = tmp_path / "rows.conll", ["Ida B-PER", "met O", "Ada B-PER"]
    file.write_text("".join(f"{i} {line}\n" for i, line in enumerate(tagged, start)))
    with pytest.raises(LoraError, match=r"the first of 3 columns counts the words") as error:
        list(read_conll(file, FormatSpec()))
    (problem,) = error.value.problems
    names = re.findall(r"\w+", (problem.hint or "").partition("columns=")[2])
    (row,) = read_conll(file, FormatSpec(columns=names))
    assert (row.columns or {})["tokens"] == ["Ida", "met", "Ada"]
    file.write_text("1 CD O\n2 CD O\n\nIda NN B-PER\nmet VB O\n3 CD O\n")
    assert [len((row.columns or {})["tokens"]) for row in read_conll(file, FormatSpec())] == [2, 3]


def test_ranges_and_empty_nodes_of_conllu_are_skipped(tmp_path: Path) -> None:
    word = "{}\t{}\t_\tNOUN\t_\t_\t0\troot\t_\tO\n"
    lines = [word.format(i, w) for i, w in (("1-2", "im"), (1, "in"), (2, "dem"), ("2.1", "x"))]
    (tmp_path / "rows.conllu").write_text("# text = im\n" + "".join(lines))
    (row,) = read_conll(tmp_path / "rows.conllu", FormatSpec())
    assert row.columns is not None
    assert (row.columns["tokens"], row.columns["misc"]) == (["in", "dem"], ["O", "O"])


def test_a_line_with_other_columns_is_reported_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.conll"
    file.write_bytes(b"EU\tB-ORG\n\nIda\tB-PER\nmet\n\nna\xefve\tO\n")
    rows = list(read_conll(file, FormatSpec()))
    assert [(row.place, row.error) for row in rows] == [
        ("rows.conll:1", ""),
        ("rows.conll:3", "line 4 has 1 column where there are 2"),
        ("rows.conll:6", "line 6: byte 0xef is not utf-8 text"),
    ]


def test_prose_and_tables_are_not_conll_files() -> None:
    assert is_conll(["EU B-ORG", "x O", ""] * 5)
    assert not is_conll(["a text O"] * 20)  # a single tag: there are no entities to find
    assert not is_conll(["Vitamin B-12 is good", "and so is O negative"] * 10)
    assert not is_conll(["EU,B-ORG", "x,O"] * 10)
