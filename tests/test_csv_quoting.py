"""Quotation marks in tables like those of real corpora, compared with independent readers."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest

from lora_cli.data import csv_quoting
from lora_cli.data.csv_quoting import Quoting, _Marks, _Reading, announce_quoting, quoting_of
from lora_cli.data.file_formats import columns_of, read_rows
from lora_cli.recipe import FormatSpec

# like GLUE: tabs, no quoting, and quotation marks anywhere
RTE = """\
index\tsentence1\tsentence2\tlabel
0\tNo Weapons of Mass Destruction Found.\tWeapons Found.\tnot_entailment
1\t"The country's slave-like conditions" were denounced.\tThere is slavery.\tentailment
2\tHe said: "I am here." And "there".\t"I am here"\tentailment
3\t"We open the quote and never close it.\tIt is open.\tnot_entailment
4\tA 5" pipe, "quoted", and a 6" one"\tPipes" exist.\tentailment
5\t"" doubled, as MRPC has it.\tDoubled."\tentailment
"""
MRPC = """\
Quality\t#1 ID\t#2 ID\t#1 String\t#2 String
1\t702876\t702977\tAmrozi accused his brother, whom he called "the witness".\tReferring to him.
0\t2108705\t2108831\tYucaipa owned Dominick's.\t"Yucaipa bought it in 1995.
1\t1330381\t1330521\t"They published it," he said.\tOn June 10, they'd published it."
0\t3344667\t3344648\t"The stock rose.\tPG&E shares jumped.
1\t1236820\t1236712\t"Revenue fell."\tWith the scandal, "revenue" fell.
"""
STS = """\
index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore
0\tmain\tMSRvid\t2012test\t1\tnone\tnone\tA plane is taking off.\tAn air plane "takes" off.\t5.000
1\tmain\tMSRvid\t2012test\t4\tnone\tnone\t"A man is playing a flute.\tA man plays.\t3.800
"""
COLA = """\
gj04\t1\t\tOur friends won't buy this analysis, let alone the next one we propose.
gj04\t0\t*\t"One more pseudo generalization and I'm giving up.
gj04\t1\t\tFred "watered" the plants flat."
r-67\t1\t\t"Quoted."
"""
SMS = """\
ham\tGo until jurong point, crazy..
spam\t"Free entry in 2 a wkly comp
ham\tU dun say so early hor... U c already then say...
ham\t"Nah I don't think he goes to usf", he lives around here
spam\t""WINNER!!" As a valued customer"
ham\tEven my brother is not like to speak with me. "
"""
OPEN = 'text\tlabel\n"Open quote\tpos\nrow in the middle\tneg\nlast row"\tpos\nanother\tneg\n'
PLAIN = {
    "rte.tsv": RTE, "mrpc.tsv": MRPC, "sts.tsv": STS, "cola.tsv": COLA, "sms.tsv": SMS,
    "open.tsv": OPEN, "lone.tsv": 'text\tlabel\na film\t1\nthe last\t"\n',
    "mid.tsv": 'a\tb\nsay "x"\t1\n"say" x\t2\n', "crlf.tsv": RTE.replace("\n", "\r\n"),
    "cr.tsv": MRPC.replace("\n", "\r"), "no_end.tsv": RTE.rstrip("\n"),
}  # fmt: skip
NO_HEADER = {"cola.tsv", "sms.tsv"}


def written(rows: list[list[str]], **dialect: Any) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n", **dialect).writerows(rows)
    return file.getvalue()


ROWS = [
    ["text", "label"],
    ['He said "hi", twice', "pos"],
    ["two\nlines, and\r\nthree", "neg"],
    ['"enclosed"', "pos"],
    ["a\ttab", "neg"],
    ["", "pos"],
    ['5" pipe', "neg"],
    ['"', "pos"],
    ["plain", "neg"],
]
MARKS = [["text", "label"], *([f'a "word" {i}', "ab"[i % 2]] for i in range(4)), ["none", "a"]]
AIRLINE = """\
tweet_id,airline_sentiment,text,tweet_created
570306133677760513,neutral,@VirginAmerica What @dhepburn said.,2015-02-24
570301031407624196,negative,"@VirginAmerica it's really aggressive to blast ""entertainment"" in
your guests' faces &amp; they have little recourse",2015-02-24
570300817074462722,negative,"@united bad, bad",2015-02-24
"""
CSV = {
    "minimal.csv": (written(ROWS), {}),
    "all.csv": (written(ROWS, quoting=csv.QUOTE_ALL), {}),
    "minimal.tsv": (written(ROWS, delimiter="\t"), {}),
    "all.tsv": (written(ROWS, delimiter="\t", quoting=csv.QUOTE_ALL), {}),
    "marks.tsv": (written(MARKS, delimiter="\t"), {}),
    "marks.csv": (written(MARKS), {}),
    "enclosed.tsv": (written([["a", "b"], ["x y", "1"], ["z", "2"]], delimiter="\t",
                             quoting=csv.QUOTE_ALL), {}),
    "semicolon.csv": (written(ROWS, delimiter=";"), {"delimiter": ";"}),
    "airline.csv": (AIRLINE, {}),
    "bom.csv": ("\ufeff" + written(ROWS, quoting=csv.QUOTE_ALL), {}),
    "one.csv": (written([["text"], ["a"], ["two\nlines"], ["x, y"], ['say "x"']]), {}),
    "one_enclosed.csv": (written([["text"], ["a\nb"], ["c"]], quoting=csv.QUOTE_ALL), {}),
    "quoted_header.csv": ('"a, b",label\nx,1\n"y, z",2\n', {}),
    "lines_in_header.csv": ('"a\nb",label\nx,1\n"y, z",2\n', {}),
    "commas_and_lines.csv": ('text,label\n"Hello, you\nbye",pos\nx,neg\n', {}),
    "nul.csv": ('text,label\n"a\0, b",1\n"c ""d""",2\n', {}),
}  # fmt: skip


def read(path: Path, content: str, **form: Any) -> tuple[FormatSpec, list[list[str]], list[str]]:
    path.write_bytes(content.encode())
    spec = FormatSpec(**form)
    rows = list(read_rows(path, spec))
    good = [list(row.columns.values()) for row in rows if row.columns is not None]
    return spec, good, [row.error for row in rows if row.error]


@pytest.mark.parametrize("name", PLAIN)
def test_files_without_quoting_are_read_line_by_line(name: str, tmp_path: Path) -> None:
    header = name not in NO_HEADER
    spec, rows, errors = read(tmp_path / name, PLAIN[name], header=header)
    assert quoting_of(tmp_path / name, spec).name == "none"
    expected = pandas.read_csv(
        tmp_path / name, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, na_filter=False,
        header=0 if header else None, engine="c",
    )  # fmt: skip
    assert (rows, errors) == (expected.to_numpy().tolist(), [])
    if header:
        assert columns_of(tmp_path / name, spec) == list(expected.columns)


@pytest.mark.parametrize("name", CSV)
def test_files_with_quoting_are_read_as_csv(name: str, tmp_path: Path) -> None:
    content, form = CSV[name]
    spec, rows, errors = read(tmp_path / name, content, **form)
    assert quoting_of(tmp_path / name, spec).name == "csv"
    delimiter = form.get("delimiter") or ("\t" if name.endswith(".tsv") else ",")
    reader = csv.reader(io.StringIO(content.removeprefix("\ufeff"), newline=""),
                        delimiter=delimiter, strict=True)  # fmt: skip
    header, *expected = reader
    assert (rows, errors) == (expected, [])
    assert columns_of(tmp_path / name, spec) == header


def test_backslashes_before_marks(tmp_path: Path) -> None:
    content = (
        'text,label\n"He said \\"hi\\", twice",pos\n"C:\\new, \\\\\\"x\\"",neg\nplain \\ ,pos\n'
        '"ends \\\\",neg\n"a ""b"", c",pos\n'
    )
    spec, rows, errors = read(tmp_path / "x.csv", content)
    assert quoting_of(tmp_path / "x.csv", spec).name == "backslash"
    assert rows == [
        ['He said "hi", twice', "pos"], ['C:\\new, \\"x"', "neg"], ["plain \\ ", "pos"],
        ["ends \\", "neg"], ['a "b", c', "pos"],
    ]  # fmt: skip
    assert errors == []
    # a backslash at the end of a quoted csv field escapes nothing
    spec, rows, errors = read(tmp_path / "y.csv", 'text,label\n"C:\\a, b\\",x\n"c",y\n')
    assert (rows, errors) == ([["C:\\a, b\\", "x"], ["c", "y"]], [])


@pytest.mark.parametrize(
    ("content", "name", "n_rows", "n_faults"),
    [
        # one broken row does not mean that a file of quoted fields has no quoting
        ('"a","b"\n"x","1"\n"say "hi" now","2"\n"y","3"\n', "csv", 2, 1),
        ('a,b\n"x ""y""",1\n"z ""w""",2\n"say "hi" now",3\nv,4\n', "csv", 3, 1),
        # only a row with too few fields is lost, in either reading
        ('a\tb\n"x\t1\ny\n"z" w\t2\n"v\t3\n', "none", 3, 1),
        ("a,b\n" + '"x" y,1\n' * 30 + "z\n", "none", 30, 1),
        # both readings have errors: quoting is usual in comma-separated files
        ('a,b\n"one "two" three\nfour",x\n5,6\n', "csv", 1, 2),
        ('text\n"a" b\n"c\n', "none", 2, 0),
        ('text\n"a, ""b"""\n"c\nd"\n"e" f\n', "csv", 2, 1),
    ],
)
def test_files_that_fit_neither_reading(
    content: str, name: str, n_rows: int, n_faults: int, tmp_path: Path
) -> None:
    path = tmp_path / ("x.tsv" if "\t" in content else "x.csv")
    spec, rows, errors = read(path, content)
    assert (quoting_of(path, spec).name, len(rows), len(errors)) == (name, n_rows, n_faults)


def test_a_decision_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {**PLAIN, **{k: v for k, (v, _) in CSV.items()}}.items():
        (tmp_path / name).write_bytes(content.encode())
        form = {"header": False} if name in NO_HEADER else {}
        form |= {"delimiter": ";"} if name.startswith("semi") else {}
        for _ in range(2):
            announce_quoting(tmp_path / name, FormatSpec(**form))
        said = capsys.readouterr().err
        assert len(said.splitlines()) == (name in PLAIN or name == "commas_and_lines.csv"), said
        if name in PLAIN:
            assert (
                f"{name}: quotation marks are part of the text (`data.format.quoting: none`)"
                in said
            )
    announce_quoting(tmp_path / "rte.tsv", FormatSpec(quoting="none"))
    assert capsys.readouterr().err == ""


def test_joined_lines_are_counted_if_each_could_be_a_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    spec, rows, _ = read(path, OPEN.replace("\t", ","))
    result = quoting_of(path, spec)
    assert (result.name, result.joined, result.first_joined, len(rows)) == ("csv", 1, 2, 2)


def test_an_unclosed_mark_does_not_read_the_whole_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.data.csv_rows.MAX_LINES", 10)
    content = 'a,b\n"open,1\n' + "x,2\n" * 30 + '"y, z",3\n'
    _, rows, errors = read(tmp_path / "x.csv", content, quoting="csv")
    assert (len(rows), len(errors)) == (31, 1)


# ------------------------------------------------------------------------ one value at a time


READ = (
    'a,b\nx,1\n"y, z",2\n"p\nq",3\n"r,4\ns",5\nsay "hi" now,6\n"bad" x,7\n1,2,3\n'
)  # fmt: skip


def file_of(tmp_path: Path, content: str, name: str = "x.csv") -> Path:
    (tmp_path / name).write_bytes(content.encode())
    return tmp_path / name


def test_statistics_of_each_reading_of_a_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, READ)
    spec = FormatSpec()
    result, escapes = csv_quoting._read_quoted(path, spec, "csv")
    # lost: the broken row and the one with three fields; only lines 6 and 7 could each be a row
    assert result == _Reading(width=2, lost=2, joined=1, first_joined=6, enclosed=3, differs=True)
    assert not escapes
    marks = _Marks()
    plain = csv_quoting._read_plain(path, spec, marks)
    assert plain == _Reading(width=2, lost=3, joined=0, first_joined=0, enclosed=0, differs=False)
    assert (marks.filled, marks.wrapped) == ({0: 6, 1: 6}, {})
    assert (marks.doubled, marks.needless, marks.stray, marks.header) == (0, 0, 5, False)
    header = file_of(tmp_path, '"a","b"\nx,1\n', "header.csv")
    csv_quoting._read_plain(header, spec, marks)
    assert marks.header
    none = csv_quoting._read_quoted(file_of(tmp_path, "a,b\nx,1\ny\n", "none.csv"), spec, "csv")
    assert none == (_Reading(2, 1, 0, 0, 0, False), False)
    told = FormatSpec(header=False, columns=["a", "b", "c"])
    result, _ = csv_quoting._read_quoted(path, told, "csv")
    assert (result.width, result.lost) == (3, 9)  # of ten lines, one has three fields
    assert csv_quoting._read_quoted(path, FormatSpec(header=False), "csv")[0].width == 2


@pytest.mark.parametrize(
    ("value", "wrapped"),
    [('"x"', True), ('""', True), ('"a ""b"""', True), (' "x" ', True), ('"', False), ("", False),
     ('"x', False), ('x"', False), ('""a"', False), ('"a""', False), ('"a"b"', False),
     ("xx", False), ('"a""b"', True)],
)  # fmt: skip
def test_fields_in_quotation_marks_are_recognised(value: str, wrapped: bool) -> None:
    assert csv_quoting.is_wrapped(value) == wrapped


def test_marks_in_fields_are_counted() -> None:
    marks = _Marks()
    csv_quoting._count_marks(marks, ["", "plain", '"x"', '"a ""b"""', '" "', 'say "x"', '"'])
    csv_quoting._count_marks(marks, ["full", "plain", '"yy"', "c", "d", "e", "f"])
    assert marks.filled == {0: 1, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2}
    assert marks.wrapped == {2: 2, 3: 1, 4: 1}
    assert (marks.doubled, marks.needless, marks.stray) == (1, 2, 2)


@pytest.mark.parametrize(
    ("wrapped", "filled", "header", "plain"),
    [(2, 4, False, True), (2, 5, False, False), (1, 1, False, False), (3, 6, False, True),
     (0, 9, True, True), (0, 0, False, False), (3, 7, False, False)],
)  # fmt: skip
def test_quoting_is_obvious_if_half_of_a_column_or_the_header_is_quoted(
    wrapped: int, filled: int, header: bool, plain: bool
) -> None:
    marks = _Marks(Counter({1: wrapped}), Counter({0: 99, 1: filled}), header=header)
    assert marks.are_plain == plain


def reading(lost: int, width: int = 2, enclosed: int = 0, joined: int = 0) -> _Reading:
    return _Reading(width=width, lost=lost, joined=joined, enclosed=enclosed)


TABS = "tabs divide the columns"


@pytest.mark.parametrize(
    ("quoted", "plain", "marks", "tabbed", "why"),
    [
        # one column: more broken rows than well quoted ones
        (reading(2, enclosed=1), reading(0, 1), {}, False, "as csv 2 lines do not fit"),
        (reading(1), reading(0, 1), {}, False, "as csv 1 line does not fit"),
        (reading(1, enclosed=1), reading(0, 1), {}, False, ""),
        # csv loses fewer lines, or quoting is obvious
        (reading(1), reading(2), {"stray": 9}, True, ""),
        (reading(9), reading(0), {"header": True}, True, ""),
        (reading(2), reading(0), {"doubled": 3}, True, ""),
        (reading(2), reading(0), {"doubled": 2}, True, "read so, every row has 2 fields; as csv"),
        # in comma-separated files, it must lose at most a tenth as many
        (reading(21), reading(2), {}, False, "read so, all but 2 lines have 2 fields; as csv 21 l"),
        (reading(20), reading(2), {}, False, ""),
        (reading(20), reading(2), {}, True, "read so, all but 2 lines"),
        (reading(1), reading(0), {}, False, "read so, every row"),
        # both fit equally well
        (reading(0), reading(0), {"stray": 1}, False, ""),
        (reading(0), reading(0), {"stray": 1}, True, TABS),
        (reading(0), reading(0), {"needless": 1}, True, TABS),
        (reading(0), reading(0), {}, True, ""),
        (reading(3), reading(3), {"stray": 1}, True, TABS),
        (reading(0, joined=2), reading(0), {"stray": 1}, True,
         f"{TABS}, and csv would join lines into 2 rows"),
    ],
)  # fmt: skip
def test_why_a_file_is_read_without_quoting(
    quoted: _Reading, plain: _Reading, marks: dict[str, Any], tabbed: bool, why: str
) -> None:
    result = csv_quoting._why_none(quoted, plain, _Marks(**marks), tabbed)
    assert result.startswith(why)
    assert bool(result) == bool(why)
    assert ("join" in result) == ("join" in why)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        # escaped marks fit where csv does not, as well as without quoting
        ('a,b\n"say \\"x\\" y",1\nz,2\n', "backslash"),
        # no better than csv
        ('a,b\nsay \\"x\\" y,1\n"c, d",2\n', "csv"),
        # more lines fit without quoting than with escapes
        ("a\tb\n" + '"x \\" y\t1\n' * 3 + "z\t2\n", "none"),
        ("a\tb\nx\t1\n", "csv"), ('a\tb\nsay "x" y\t1\n', "none"), ('a,b\nsay "x" y,1\n', "csv"),
    ],
)  # fmt: skip
def test_marks_after_a_backslash(content: str, name: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, content, "x.tsv" if "\t" in content else "x.csv")
    assert quoting_of(path, FormatSpec()).name == name


def test_usual_csv_has_a_reason_only_if_lines_are_joined(tmp_path: Path) -> None:
    joined = quoting_of(file_of(tmp_path, 'a,b\n"x,1\ny",2\n', "joined.csv"), FormatSpec())
    assert joined == Quoting("csv", "usual for csv", 1, 2)
    whole = quoting_of(file_of(tmp_path, 'a,b\n"x\ny",2\n', "whole.csv"), FormatSpec())
    assert whole == Quoting("csv", "", 0, 0)
    one = quoting_of(file_of(tmp_path, 'a\n"x\ny"\n', "one.csv"), FormatSpec())
    assert one == Quoting("csv", "", 0, 0)
    assert quoting_of(tmp_path / "one.csv", FormatSpec(quoting="none")) == Quoting("none")


def test_a_file_is_searched_for_marks(tmp_path: Path) -> None:
    packed = tmp_path / "x.csv.gz"
    packed.write_bytes(gzip.compress(b"a,b\nx,1\n"))
    plain, marked = file_of(tmp_path, "a,b\n"), file_of(tmp_path, 'a\n"b"\n', "marked.csv")
    result = [csv_quoting._has_marks(path, "utf-8") for path in (packed, plain, marked)]
    assert result == [False, False, True]
    packed.write_bytes(gzip.compress(b'a,b\n"x",1\n'))
    assert csv_quoting._has_marks(packed, "utf-8")
    packed.write_bytes(b"not packed")
    assert csv_quoting._has_marks(packed, "utf-8")  # reading the file reports the error
    assert csv_quoting._has_marks(tmp_path / "absent.csv", "utf-8")
    assert csv_quoting._has_marks(plain, "cp037")  # `"` is another byte there


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_one_process_prints_how_a_file_is_read(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    announce_quoting(file_of(tmp_path, 'a\tb\n"x" y\t1\n', "x.tsv"), FormatSpec())
    assert bool(capsys.readouterr().err) == (rank == "0")
