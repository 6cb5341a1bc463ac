"""Detection of the delimiter, title and header of tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_cli.data import detect_table
from lora_cli.data.detect_format import read_data_file
from lora_cli.data.detect_table import (
    DetectedFormat,
    find_delimiter,
    find_table,
    has_header,
    is_number,
    records_of,
)
from lora_cli.errors import LoraError


def found_in(folder: Path, text: str, name: str = "rows.csv") -> DetectedFormat:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    result = DetectedFormat("csv")
    find_table(result, path, text)
    return result


# ------------------------------------------------------------------------------------ delimiter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\nc,d\n", ","), ("a;b\nc;d\n", ";"), ("a\tb\nc\td\n", "\t"), ("a|b\nc|d\n", "|"),
        ("a,b\n", ","), ("a\nb\n", None), ("", None), ("one, two\nthree\nfour, five, six\n", None),
        # the more consistent of two delimiters
        ("a,b;c\nd;e\nf,g,h;i\n", ";"),
        # of two consistent delimiters, the one with more fields
        ("a,b,c;d\ne,f,g;h\n", ","),
        # nine of ten records are enough, eight are not
        ("a;b\n" * 9 + "c\n", ";"), ("c\n" + "a;b\n" * 9, ";"), ("c\nd\n" + "a;b\n" * 8, None),
        ("c\nd\n" + "a;b\n" * 18, ";"),
        # of a few records, one may be broken, but not the first
        ("a;b\na;b\na;b\nc\n", ";"), ("c\na;b\na;b\na;b\n", None), ("a;b\na;b\nc\n", None),
        ("a;b\na;b\na;b\nc\nd\n", None),
        # a quoted delimiter does not count, unless quotes are text
        ('"a,b";c\n"d,e,f";g\n', ";"), ('5" disk,a\n3" disk,b\n', ","),
    ],
)  # fmt: skip
def test_the_delimiter_gives_most_records_the_same_number_of_fields(
    text: str, expected: str | None
) -> None:
    assert find_delimiter(text) == expected


def test_only_the_requested_delimiters_are_tried() -> None:
    assert find_delimiter("a;b\nc;d\n", ",\t") is None
    assert find_delimiter("a;b\nc;d\n", ",;") == ";"


def test_blank_and_broken_records_are_skipped() -> None:
    text = 'a,"b, c"\n\n , \n"d ""e""",f\n'
    assert records_of(text, ",") == [["a", "b, c"], ['d "e"', "f"]]
    assert records_of('a,"b\n \nc,d"\n', ",", "none") == [["a", '"b'], ["c", 'd"']]
    assert records_of('"a\\"b",c\n', ",", "backslash") == [['a"b', "c"]]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rows.csv", "text,label\na b,x\nc d,y\n", {}),
        ("rows.tsv", "text\tlabel\na b\tx\nc d\ty\n", {}),
        ("rows.TSV.gz", "text\tlabel\na b\tx\nc d\ty\n", {}),
        ("rows.csv", "text\tlabel\na b\tx\nc d\ty\n", {"delimiter": "\t"}),
        ("rows.tsv", "text,label\na b,x\nc d,y\n", {"delimiter": ","}),
        ("rows.csv", "sep=;\ntext;label\na b;x\n", {"skip_lines": 1, "delimiter": ";"}),
        ("rows.csv", '"sep=#"\r\ntext#label\r\na b#x\r\n', {"skip_lines": 1, "delimiter": "#"}),
        # a single column whose texts have commas
        ("rows.csv", "text\na b\nc, d\ne\n", {"delimiter": "\t"}),
        ("rows.csv", "text\na\tb\nc, d\ne;f\n", {"delimiter": "|"}),
        ("rows.csv", "text\na b\nc d\n", {}),
    ],
)
def test_only_values_other_than_the_defaults_are_set(
    name: str, text: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    plain = name.removesuffix(".gz")
    if name != plain:  # quoting is decided from the file, which is not compressed here
        path = tmp_path / plain
        path.write_text(text, encoding="utf-8")
        result = DetectedFormat("csv")
        find_table(result, path, text)
    else:
        result = found_in(tmp_path, text, name)
    assert (result.kind, result.values, result.has_names) == ("csv", expected, True)
    assert result.why.keys() == expected.keys()


@pytest.mark.parametrize("kind", ["json", "parquet", "conll"])
def test_files_other_than_tables_name_their_columns(kind: str) -> None:
    assert DetectedFormat(kind).has_names


def test_sentences_without_a_header_are_a_text(tmp_path: Path) -> None:
    result = found_in(tmp_path, "It is late, and I am here.\nNo.\nYes, and no, and yes.\n")
    assert (result.kind, result.values, result.has_names) == ("text", {}, False)


# ---------------------------------------------------------------------------------------- title


ROWS = "text,label,score\n" + "".join(f"words {i} of it,kind,{i}\n" for i in range(6))


@pytest.mark.parametrize(
    ("above", "skipped"),
    [
        ("", None), ("Export of May\n", 1), ("Export of May\n\n\n", 3), ("A\nB, C\n\n", 3),
        ('"two\nlines"\n', 2), ("A\n" * 4, 4), ("A,B,C,D\n", None),
    ],
)  # fmt: skip
def test_a_title_is_skipped(above: str, skipped: int | None, tmp_path: Path) -> None:
    rows = ROWS + "".join(f"more {i} of it,kind,{i}\n" for i in range(60))
    result = found_in(tmp_path, above + rows)
    assert result.values.get("skip_lines") == skipped
    if skipped:
        assert result.has_names
        assert "columns" not in result.values


def test_a_title_has_at_most_ten_lines(tmp_path: Path) -> None:
    rows = ROWS + "".join(f"more {i} of it,kind,{i}\n" for i in range(200))
    assert found_in(tmp_path, "A\n" * 10 + rows).values["skip_lines"] == 10
    assert "skip_lines" not in found_in(tmp_path, "A\n" * 11 + rows).values


def test_a_title_follows_the_line_of_the_delimiter(tmp_path: Path) -> None:
    result = found_in(tmp_path, "sep=;\nExport of May\n" + ROWS.replace(",", ";"))
    assert result.values == {"skip_lines": 2, "delimiter": ";"}


def test_a_header_written_by_r_lacks_the_name_of_the_first_column(tmp_path: Path) -> None:
    rows = "".join(f"{i},some words {i},kind\n" for i in range(1, 12))
    result = found_in(tmp_path, "text,label\n" + rows)
    assert result.values == {
        "header": False, "columns": ["row", "text", "label"], "skip_lines": 1,
    }  # fmt: skip
    # if the names cannot be a header, they are a title
    result = found_in(tmp_path, "9,8\n" + "text,label,score\n" + rows)
    assert result.values == {"skip_lines": 1}


# --------------------------------------------------------------------------------------- header


def test_columns_without_a_header_are_numbered(tmp_path: Path) -> None:
    result = found_in(tmp_path, "".join(f"some words {i},{i}\n" for i in range(5)))
    assert result.values == {"header": False, "columns": ["column_1", "column_2"]}
    assert not result.has_names


def test_duplicate_names_are_numbered(tmp_path: Path) -> None:
    rows = "".join(f"some words {i},{i},{i},{i}\n" for i in range(5))
    result = found_in(tmp_path, "text,score,,score\n" + rows)
    assert "columns" in result.values
    assert result.values["columns"] == ["text", "score", "column_3", "score_4"]
    assert "columns" not in found_in(tmp_path, "text,score,,label\n" + rows).values


WORDS = [f"a text of some {i} words" for i in range(10)]


@pytest.mark.parametrize(
    ("first", "below", "expected"),
    [
        # a common column name, unless it is also one of the values
        ("text", WORDS, True), ("Labels", ["a", "b"] * 5, True), ("label_2", ["1"] * 5, True),
        ("title", ["title", "x", "y"], False), ("title", ["title", *map(str, range(40))], True),
        # a number is a value, and a word above numbers is a name
        ("5", ["a", "b"], False), ("x", ["1", "2.5", "-3"], True), ("x", [*"123456789b"], False),
        ("x", [*map(str, range(91)), *"abcdefghi"], True),
        # in a column of few distinct values, it is one of them or their name
        ("a", ["a", "b", "a", "b"], False), ("c", ["a", "b", "a", "b"], True),
        ("c", ["a", "b", "a"], False), ("a", ["a", "a"], False),
        # a text is not a name
        ("a b c d e f", WORDS, False), ("stop.", WORDS, False), ("https://a", WORDS, False),
        ("x" * 61, ["y" * 900, "z" * 900], False),
        ("x" * 60, ["y" * 900, "z" * 900], True),
        # a name is much shorter than the texts below it
        ("a", WORDS, True), ("some_words", WORDS, False), ("two words", ["x" * 28, "y" * 28], True),
        ("two words", ["x" * 27, "y" * 27], False), ("a,b", WORDS, False),
        # without rows below, only common names are a header
        ("text", [], True), ("hello", [], False), ("", ["a"], False),
    ],
)  # fmt: skip
def test_a_header_differs_from_the_rows_below(first: str, below: list[str], expected: bool) -> None:
    assert has_header([[first], *([value] for value in below)]) is expected


def test_all_columns_vote_on_the_header(tmp_path: Path) -> None:
    assert has_header([["text", "label"], ["a", "b"], ["c"]])
    pairs = [[f"query {i}", f"answer {i}", f"no {i}"] for i in range(9)]
    assert has_header([["anchor", "positive", "negative"], *pairs])
    assert not has_header([["negative", "a film"], *[["negative", f"film {i}"] for i in range(9)]])
    assert has_header([["text", "5"]]) is False
    assert has_header([["text", "label"]])
    assert has_header([["text", ""]])
    assert has_header([["5", "text", "label"], ["a", "b", "c"]])  # 2 x 3 against 3
    assert not has_header([["5", "text"], ["a", "b"]])  # 3 against 3
    assert has_header([[" text "], [" "], ["a"]])
    assert not has_header([["text"], *[["text"]] * 3])


def test_numbers_in_several_notations() -> None:
    for text in ("1", "-2.5", "1,5", "1e3", "1,234.5"):
        assert is_number(text), text
    for text in ("", "a", "1a", "1 or 2", "."):
        assert not is_number(text), text


def test_a_name_may_be_at_most_a_twentieth_of_its_values() -> None:
    assert detect_table._header_score("title", ["title", *["x"] * 19]) == 3
    assert detect_table._header_score("title", ["title", *["x"] * 18]) == -1
    assert detect_table._header_score("", ["x"]) == detect_table._header_score("x", []) == 0


@pytest.mark.parametrize("share", [1.0, 0.3, 0.11])
@pytest.mark.parametrize("name", ["rows.csv", "rows.txt"])
def test_texts_with_unquoted_commas_are_an_error(share: float, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    texts = [f"a film, really {i}" if i < share * 100 else f"a film {i}" for i in range(100)]
    file.write_text("label,text\n" + "".join(f"{'ab'[i % 2]},{t}\n" for i, t in enumerate(texts)))
    if name == "rows.txt":  # lines of text, according to the extension
        assert read_data_file(file).form == {}
        return
    with pytest.raises(
        LoraError, match=f"the header names 2 columns, and {share * 100:.0f} of 100"
    ):
        read_data_file(file)
    quoted = [f'{"ab"[i % 2]},"{t}"' for i, t in enumerate(texts)]
    file.write_text("\n".join(["label,text", *quoted]) + "\n")
    assert [list(row.values()) for row in read_data_file(file).rows] == [
        ["ab"[i % 2], t] for i, t in enumerate(texts)
    ]


def test_row_names_must_be_unique(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"{i},a film {i},{i % 2}\n" for i in range(50)))
    assert read_data_file(file).columns == ["row", "text", "label"]
