"""How quotation marks are read: tables as real corpora are written, against independent readers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pandas
import pytest

from lora_cli.data.csv_quoting import announce_quoting, quoting_of
from lora_cli.data.readers import columns_of, read_rows
from lora_cli.recipe import FormatSpec

# as GLUE's corpora are written: tabs, no quoting, marks wherever the newspaper had them
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
    wanted = pandas.read_csv(
        tmp_path / name, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, na_filter=False,
        header=0 if header else None, engine="c",
    )  # fmt: skip
    assert (rows, errors) == (wanted.to_numpy().tolist(), [])
    if header:
        assert columns_of(tmp_path / name, spec) == list(wanted.columns)


@pytest.mark.parametrize("name", CSV)
def test_files_with_quoting_are_read_as_csv(name: str, tmp_path: Path) -> None:
    content, form = CSV[name]
    spec, rows, errors = read(tmp_path / name, content, **form)
    assert quoting_of(tmp_path / name, spec).name == "csv"
    delimiter = form.get("delimiter") or ("\t" if name.endswith(".tsv") else ",")
    reader = csv.reader(io.StringIO(content.removeprefix("\ufeff"), newline=""),
                        delimiter=delimiter, strict=True)  # fmt: skip
    header, *wanted = reader
    assert (rows, errors) == (wanted, [])
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
    # a backslash at the end of a quoted field of a csv file escapes nothing
    spec, rows, errors = read(tmp_path / "y.csv", 'text,label\n"C:\\a, b\\",x\n"c",y\n')
    assert (rows, errors) == ([["C:\\a, b\\", "x"], ["c", "y"]], [])


@pytest.mark.parametrize(
    ("content", "name", "n_rows", "n_faults"),
    [
        # one broken row does not make a file of quoted fields one without quoting
        ('"a","b"\n"x","1"\n"say "hi" now","2"\n"y","3"\n', "csv", 2, 1),
        ('a,b\n"x ""y""",1\n"z ""w""",2\n"say "hi" now",3\nv,4\n', "csv", 3, 1),
        # a row with too few fields is lost in either reading; the others are not
        ('a\tb\n"x\t1\ny\n"z" w\t2\n"v\t3\n', "none", 3, 1),
        ("a,b\n" + '"x" y,1\n' * 30 + "z\n", "none", 30, 1),
        # both are broken: quoting is usual where commas divide
        ('a,b\n"one "two" three\nfour",x\n5,6\n', "csv", 1, 2),
        ('text\n"a" b\n"c\n', "none", 2, 0),
        ('text\n"a, ""b"""\n"c\nd"\n"e" f\n', "csv", 2, 1),
    ],
)
def test_files_that_fit_neither_way(
    content: str, name: str, n_rows: int, n_faults: int, tmp_path: Path
) -> None:
    path = tmp_path / ("x.tsv" if "\t" in content else "x.csv")
    spec, rows, errors = read(path, content)
    assert (quoting_of(path, spec).name, len(rows), len(errors)) == (name, n_rows, n_faults)


def test_what_had_to_be_decided_is_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_lines_that_csv_joins_are_counted_where_each_could_be_a_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    spec, rows, _ = read(path, OPEN.replace("\t", ","))
    found = quoting_of(path, spec)
    assert (found.name, found.joined, found.first_joined, len(rows)) == ("csv", 1, 2, 2)


def test_an_open_mark_does_not_take_the_whole_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.data.csv_rows.MOST_LINES", 10)
    content = 'a,b\n"open,1\n' + "x,2\n" * 30 + '"y, z",3\n'
    _, rows, errors = read(tmp_path / "x.csv", content, quoting="csv")
    assert (len(rows), len(errors)) == (31, 1)
