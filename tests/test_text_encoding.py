"""Detection of encodings from bytes, and errors for files in another encoding."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.data.detect_format import read_data_file, read_head
from lora_cli.data.file_formats import read_rows
from lora_cli.data.input_files import input_form
from lora_cli.data.text_encoding import encoding_of, lines_of, seven_bit_encoding
from lora_cli.data.text_lines import encoding_hint
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

JAPANESE = ["返品したいのですが", "請求書が届きません", "ログインできない", "ありがとう"]
CHINESE = ["我想退货怎么办", "发票没有收到", "不能登录了", "谢谢你们"]
KOREAN = ["반품하고 싶은데요", "청구서가 오지 않았어요", "로그인이 안 돼요", "감사합니다"]
FRENCH = ["Où est ma commande", "La facture n'est pas arrivée", "Très déçu", "Ça marche"]
CODED = [
    ("iso2022_jp", JAPANESE), ("iso2022_jp_ext", ["ｶﾀｶﾅ です"]), ("iso2022_kr", KOREAN),
    ("hz", CHINESE), ("utf-7", JAPANESE), ("utf-7", FRENCH), ("utf-7", KOREAN),
]  # fmt: skip
BYTES = [
    ("cp932", [*JAPANESE, "①番"]), ("cp932", JAPANESE), ("euc_jp", JAPANESE),
    ("gb18030", CHINESE), ("euc_kr", KOREAN), ("cp1252", FRENCH), ("utf-16", JAPANESE),
    ("utf-16", FRENCH),
]  # fmt: skip


def table(texts: list[str], between: str = ",") -> str:
    rows = (f"{text}{between}{'ab'[i % 2]}\n" for i, text in enumerate(texts))
    return f"text{between}label\n" + "".join(rows)


@pytest.mark.parametrize(("encoding", "texts"), [*CODED, *BYTES])
def test_the_encoding_is_detected_and_the_rows_are_read(
    encoding: str, texts: list[str], tmp_path: Path
) -> None:
    raw = table(texts).encode(encoding)
    assert encoding_of(raw)[0] == encoding
    (tmp_path / "x.csv").write_bytes(raw)
    file = read_data_file(tmp_path / "x.csv")
    assert file.form["encoding"] == encoding
    assert [row["text"] for row in file.rows] == texts


@pytest.mark.parametrize(
    ("encoding", "texts", "above"),
    [*((*coded, 0) for coded in CODED), (*CODED[0], 500), (*CODED[1], 500)],
)
def test_escape_sequences_are_never_read_as_text(
    encoding: str, texts: list[str], above: int, tmp_path: Path
) -> None:
    """ISO 2022 is detected even after many lines of plain ASCII."""
    text = table(["a plain text"] * above + texts)
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    with pytest.raises(LoraError, match=rf"this is {encoding} text[\s\S]*encoding={encoding}`"):
        list(read_rows(tmp_path / "x.csv", FormatSpec()))
    rows = list(read_rows(tmp_path / "x.csv", FormatSpec(encoding=encoding)))
    assert [row.columns["text"] for row in rows if row.columns][above:] == texts


@pytest.mark.parametrize("given", ["utf-8", "cp932"])
@pytest.mark.parametrize(("encoding", "texts"), [*CODED[:1], ("utf-16-le", ["abc", "def"])])
def test_escape_sequences_are_decoded_whatever_the_encoding_in_the_recipe(
    encoding: str, texts: list[str], given: str, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_bytes(table(texts * 4).encode(encoding))
    form = input_form(
        tmp_path / "x.csv", read_head(tmp_path / "x.csv"), FormatSpec(encoding=given), ["text"]
    )
    assert form.encoding == encoding
    rows = [row.columns["text"] for row in read_rows(tmp_path / "x.csv", form) if row.columns]
    assert rows == texts * 4


@pytest.mark.parametrize(
    "text",
    ["a+b", "1 + 2 = 3", "C++ and C++-", "+81-3-1234", "x+-y", "~{ ~}", "~{abc~}", "a\x1b[31mred",
     "\x1b(B\x1b[m", "\x1b", "+ABC-", "me+you@x.org", "", "+/+/"],
)  # fmt: skip
def test_plain_text_is_not_read_as_escape_sequences(text: str) -> None:
    assert seven_bit_encoding(table([text, "plain"]).encode()) is None


@pytest.mark.parametrize(("encoding", "texts"), BYTES[:-2])
def test_the_hint_names_the_encoding_of_the_file(
    encoding: str, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(table(texts).encode(encoding))
    for wrong in ("utf-8", "cp1252" if encoding != "cp1252" else "ascii"):
        assert f"`--set data.format.encoding={encoding}`" in encoding_hint(path, wrong)
    assert "--set" not in encoding_hint(path, encoding)  # repeating the same hint would not help


@pytest.mark.parametrize(
    ("name", "expected"),
    [("windows-31j", "cp932"), ("Windows_31J", "cp932"), ("x-sjis", "cp932"), ("MS932", "MS932"),
     ("cp51932", "euc_jp"), ("cp50221", "iso2022_jp_ext"), ("utf8mb4", "utf-8"),
     ("UTF-8-BOM", "utf-8"), ("UCS-2", "utf-16"), ("windows-949", "cp949"),
     ("shift_jis", "shift_jis")],
)  # fmt: skip
def test_names_that_other_programs_use(name: str, expected: str) -> None:
    assert FormatSpec(encoding=name).encoding == expected


def test_a_file_with_a_zero_byte_is_not_utf_16() -> None:
    assert encoding_of(b"text,label\na\0b,1\nc,2\n")[0] == "utf-8"
    assert encoding_of("text,label\nab,1\n".encode("utf-16-le"))[0] == "utf-16-le"
    assert encoding_of("文,本\n日本,語\n".encode("utf-16-be"))[0] == "utf-16-be"


ODD_ENDS = ["a\u2028b", "a\x85b", "a\u2029b", "a\x0bb", "a\x0cb", "a\x1cb", "a\x1eb"]


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    assert lines_of("a\r\nb\rc\nd") == ["a", "b", "c", "d"]
    assert lines_of("a\n\n") == ["a", ""]
    assert lines_of("") == []
    for text in ODD_ENDS:
        assert lines_of(f"{text}\n") == [text]
    for name, between in (("x.csv", ","), ("x.tsv", "\t"), ("x.txt", "\t")):
        (tmp_path / name).write_text(table(ODD_ENDS * 3, between), encoding="utf-8", newline="")
        rows = read_data_file(tmp_path / name).rows
        assert [row["text"] for row in rows] == ODD_ENDS * 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_a_text_file_of_columns_is_a_table(encoding: str, tmp_path: Path) -> None:
    """Like Excel's "Unicode text", with quotes around cells with quotation marks or line ends."""
    texts = [*JAPANESE, 'say ""hi"", twice', "two\nlines"] * 3
    content = "text\tlabel\r\n" + "".join(f'"{t}"\t{"ab"[i % 2]}\r\n' for i, t in enumerate(texts))
    (tmp_path / "x.txt").write_bytes(content.encode(encoding))
    file = read_data_file(tmp_path / "x.txt")
    assert [row["text"] for row in file.rows] == [text.replace('""', '"') for text in texts]
    assert {row["label"] for row in file.rows} == {"a", "b"}
