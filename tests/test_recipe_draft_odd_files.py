"""Recipes and errors of `lora init` for adversarial and unusual files."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny
from drafting import Init, classification, labelled, lines, run_hint, said, table, texts

from lora_cli.data.load_rows import load_rows
from lora_cli.data.text_encoding import encoding_of
from lora_cli.data.text_lines import read_lines
from lora_cli.errors import LoraError
from lora_cli.preprocessing.encode import check_data
from lora_cli.recipe import Recipe
from lora_cli.recipe_draft import draft_recipe
from lora_cli.tasks import build_task

ROWS = labelled(40, ["good", "bad"])
TEXTS = [text for text, _ in ROWS]


def dumped(recipe: Recipe) -> dict[str, Any]:
    return recipe.data.format.model_dump(exclude_defaults=True)


def first(recipe: Recipe) -> dict[str, Any]:
    """Return the first row, as training would read it."""
    recipe = recipe.with_values({"data.validation": None, "data.test": None})
    return load_rows(recipe)["train"][0]


def beside(name: str, value: Callable[[int], Any], at: int = 0) -> str:
    """Return a table of text and label with another column."""
    header, rows = ["text", "label"], [list(row) for row in ROWS]
    header.insert(at, name)
    for i, row in enumerate(rows):
        row.insert(at, value(i))
    return table(header, rows)


PLAIN = classification("text", "label", ["bad", "good"])
TABLE = table(["text", "label"], ROWS)
SEMICOLONS = table(["text", "label"], ROWS, ";")
FRENCH = [[f"très réussi, à voir {text}", label] for text, label in ROWS]

# name: file, expected task, expected format
ODD: list[tuple[str, str | bytes, dict[str, Any], dict[str, Any]]] = [
    ("a mark of UTF-8 before Latin-1, with semicolons",
     b"\xef\xbb\xbf" + table(["Texte", "Note"], FRENCH, ";").encode("latin-1"),
     classification("Texte", "Note", ["bad", "good"]), {"encoding": "cp1252", "delimiter": ";"}),
    ("a mark of UTF-8 before UTF-8", b"\xef\xbb\xbf" + TABLE.encode(), PLAIN, {}),
    ("UTF-16 with tabs, as Excel's Unicode text", TABLE.replace(",", "\t").encode("utf-16"),
     PLAIN, {"encoding": "utf-16", "delimiter": "\t"}),
    ("line ends of Windows", TABLE.replace("\n", "\r\n"), PLAIN, {}),
    ("line ends of an old Mac", TABLE.replace("\n", "\r"), PLAIN, {}),
    ("line ends inside quotes, and quotes inside them",
     table(["text", "label"], [[f'{a}\r\n"so; to say"\n\nend', b] for a, b in ROWS], ";"),
     PLAIN, {"delimiter": ";"}),
    ("a delimiter after the last column", TABLE.replace("\n", ",\n"), PLAIN, {}),
    ("spaces after the commas", "text, label\n" + "".join(f'"{a}", {b}\n' for a, b in ROWS),
     PLAIN, {}),
    ("a delimiter that Excel names", f"sep=;\n{SEMICOLONS}", PLAIN,
     {"delimiter": ";", "skip_lines": 1}),
    ("a remark before the header", f"# exported on a Monday\n{TABLE}", PLAIN, {"skip_lines": 1}),
    ("a title and a blank line", f"Messages of March\n\n{TABLE}", PLAIN, {"skip_lines": 2}),
    ("a header without the name of the rows' names",
     "text,label\n" + table(None, [[i + 1, *row] for i, row in enumerate(ROWS)]), PLAIN,
     {"header": False, "columns": ["row", "text", "label"], "skip_lines": 1}),
    ("zeros at the end", TABLE.encode() + bytes(9), PLAIN, {}),
    ("names in capitals with spaces",
     table(["CASE NUMBER", "CUSTOMER MESSAGE", "ROUTED TO TEAM"],
           [[f"C{i + 100}", *row] for i, row in enumerate(ROWS)]),
     classification("CUSTOMER MESSAGE", "ROUTED TO TEAM", ["bad", "good"]), {}),
    ("pandas' index without a name", beside("", lambda i: i), PLAIN, {}),
    ("pandas' index, saved twice", beside("Unnamed: 0", lambda i: i), PLAIN, {}),
    ("a text that is called `Unnamed: 0`", table(["Unnamed: 0", "label"], ROWS),
     classification("Unnamed: 0", "label", ["bad", "good"]), {}),
    ("numbers that differ in every row, by another name",
     beside("n", lambda i: (i * 7919 + 13) % 100_003), PLAIN, {}),
    ("dates in three ways", beside("seen", lambda i: f"{i % 28 + 1}.3.2024"), PLAIN, {}),
    ("prices with a decimal comma", beside("price", lambda i: f"{i * 3 / 7:.2f}".replace(".", ",")),
     PLAIN, {}),
    ("scores with a decimal comma",
     table(["text", "score"],
           [[t, f"{i / 7:.2f}".replace(".", ",")] for i, t in enumerate(TEXTS)], ";"),
     classification("text", "score", None, problem="regression"),
     {"delimiter": ";", "decimal": ","}),
    ("a column that is nearly empty", beside("note", lambda i: "see the other mail" * (i == 3)),
     PLAIN, {}),
    ("a subject beside the text, and the label in between",
     table(["subject", "queue", "body"], [[f"about {i} {t[:9]}", label, f"{t}, and {t}"]
                                          for i, (t, label) in enumerate(ROWS)]),
     classification("body", "queue", ["bad", "good"]), {}),
    ("the label before the text", table(["spam", "text"], [[i % 2, t] for i, t in
                                                          enumerate(TEXTS)]),
     classification("text", "spam", [0, 1]), {}),
    ("labels that pandas made floats",
     table(["text", "label"], labelled(40, ["0.0", "1.0", "2.0"])),
     classification("text", "label", ["0.0", "1.0", "2.0"]), {}),
    ("yes and no", table(["text", "relevant"], labelled(40, ["yes", "no"])),
     classification("text", "relevant", ["no", "yes"]), {}),
    ("columns of 0.0 and 1.0", table(["text", "red", "green", "blue"], [
        [t, *(float(i % 3 == k) for k in range(3))] for i, t in enumerate(TEXTS)]),
     {"type": "sequence_classification", "label_columns": ["red", "green", "blue"]}, {}),
    ("texts of HTML", table(["html", "label"], [
        [f'<p class="x">{t}</p><br/>&nbsp;<a href="http://x.y/{i}">go</a>', label]
        for i, (t, label) in enumerate(ROWS)]), classification("html", "label", ["bad", "good"]),
     {}),
    ("one row with an open quote", TABLE + '"never closed, bad\n', PLAIN, {}),
]  # fmt: skip


@pytest.mark.parametrize(("content", "task", "form"), [o[1:] for o in ODD], ids=[o[0] for o in ODD])
@pytest.mark.slow_after(4)
def test_a_table(
    content: str | bytes, task: dict[str, Any], form: dict[str, Any], init: Init
) -> None:
    recipe = init("rows.csv", content)
    assert said(recipe) == task
    assert dumped(recipe) == form
    row = first(recipe)
    assert not any("\ufeff" in name or "ï»¿" in name for name in row)
    if form.get("encoding") == "cp1252":
        assert row["Texte"].startswith("très réussi, à voir")


def test_decimal_commas_are_numbers(init: Init) -> None:
    rows = [[t, f"{i / 8:.3f}".replace(".", ",")] for i, t in enumerate(TEXTS)]
    recipe = init("rows.csv", table(["text", "score"], rows, "\t"))
    recipe = recipe.with_values({"data.validation": None, "data.test": None})
    task = build_task(recipe)
    train = check_data(task, ["train"])["train"]
    assert [task.reader.number(row) for row in train] == [i / 8 for i in range(40)]  # type: ignore[attr-defined]


def test_a_comma_may_separate_labels(init: Init) -> None:
    sets = ["1,2", "2", "1", "2,3", "3"]
    rows = [[t, sets[i % 5]] for i, t in enumerate(TEXTS)]
    assert init("rows.csv", table(["text", "label"], rows, "\t")).task.problem == "multi_label"


def test_labels_that_differ_in_case_are_mentioned(
    init: Init, tmp_path: Path, bases: dict[str, Path]
) -> None:
    recipe = init("rows.csv", table(["text", "relevant"], labelled(40, ["Yes", "no", "yes", "NO"])))
    assert recipe.task.labels == ["NO", "Yes", "no", "yes"]
    assert (
        "`NO` and `no`, `Yes` and `yes` differ in case only"
        in (tmp_path / "recipe.yaml").read_text()
    )


# ----------------------------------------------------------------------------- JSON and parquet


def test_objects_next_to_columns(init: Init) -> None:
    rows = [{"id": i, "text": t, "label": b, "meta": {"of": [1]}} for i, (t, b) in enumerate(ROWS)]
    assert said(init("rows.jsonl", lines(rows))) == PLAIN


def test_a_json_list_of_one_line(init: Init) -> None:
    rows = [{"text": t, "label": b} for t, b in ROWS]
    assert said(init("rows.jsonl", json.dumps(rows))) == PLAIN


NESTED = [
    ({"id": 1, "data": {"text": "a", "label": "b"}}, "inside `data`",
     "jq -c 'del(.data) + .data' rows.jsonl > flat.jsonl"),
    ({"translation": {"en": "a", "de": "b"}}, "inside `translation`",
     "jq -c '.translation' rows.jsonl > flat.jsonl"),
    ({"text": "a longer text of words", "label": {"name": "b"}}, "`label` holds objects",
     "jq -c 'del(.label) + .label' rows.jsonl > flat.jsonl"),
    ({"id": "q1", "question": {"stem": "where?", "choices": [{"label": "A", "text": "here"}]},
      "answerKey": "A"}, "no column holds text, and `question` holds objects",
     "jq -c 'del(.question) + .question' rows.jsonl > flat.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "what", "command"), NESTED)
def test_a_command_flattens_columns_inside_objects(
    row: dict[str, Any], what: str, command: str, init: Init
) -> None:
    with pytest.raises(LoraError, match=what) as caught:
        init("rows.jsonl", lines([row | {"text": f"{t}"} if "text" in row else row for t in TEXTS]))
    assert command in (caught.value.problems[0].hint or "")


def test_a_list_inside_an_object(init: Init) -> None:
    whole = {"version": 1, "data": [{"text": t, "label": b} for t, b in ROWS]}
    with pytest.raises(LoraError, match="inside `data`") as caught:
        init("rows.json", json.dumps(whole))
    assert "jq -c '.data[]' rows.json" in (caught.value.problems[0].hint or "")


def test_parquet_of_categories_large_texts_and_more(init: Init, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "text": pa.array(TEXTS, pa.large_string()),
        "label": pa.array([label for _, label in ROWS]).dictionary_encode(),
        "seen": pa.array([1_700_000_000 + i for i in range(40)], pa.timestamp("s")),
        "vector": [[i / 3, 0.5] for i in range(40)],
        "raw": [b"\x00\xff"] * 40,
        "__index_level_0__": list(range(40)),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert said(init("", tmp_path / "rows.parquet")) == PLAIN


def test_a_compressed_table_without_its_suffix(init: Init) -> None:
    with pytest.raises(LoraError, match="compressed by gzip") as caught:
        init("rows.csv", gzip.compress(TABLE.encode()))
    assert "ends in .gz" in (caught.value.problems[0].hint or "")
    assert said(init("rows.tsv.gz", gzip.compress(TABLE.replace(",", "\t").encode()))) == PLAIN


# ------------------------------------------------------------------------- files without text rows

TMX = (
    '<?xml version="1.0"?>\n<!-- made here -->\n<tmx version="1.4"><body>'
    '<tu><tuv xml:lang="en"><seg>a film</seg></tuv></tu>' * 20
)
FOREIGN = [
    ("rows.tmx", TMX.encode(), "a translation memory .TMX.", "a column for each language"),
    ("rows.txt", TMX.encode("utf-16"), "a translation memory .TMX.", "a column for each language"),
    ("rows.xlf", b'\xef\xbb\xbf<xliff version="1.2">' * 9, "memory .XLIFF.", "for each language"),
    ("rows.xlsx", b"PK\x03\x04" + bytes(range(256)), "an Excel workbook", "as csv"),
    ("rows.csv", b"\xd0\xcf\x11\xe0" + bytes(99), "an old Excel workbook", "as csv"),
    ("rows.pdf", b"%PDF-1.4\n" + bytes(range(99)), "a PDF", "extract its text"),
    ("rows.csv", bytes(range(1, 256)) * 20, "not text", "csv, tsv"),
    ("rows.jsonl", lines([{"tokens": ["a", "b"], "ner_tags": [0, i % 5]} for i in range(20)])
     .encode(), "`ner_tags` holds the numbers of tags", "tag_names"),
    ("rows.arff", ("% by Weka\n@RELATION opinions\n@ATTRIBUTE text string\n@DATA\n"
     + "'a film',pos\n" * 9).encode(), "an ARFF file", "write it as csv"),
    ("rows.txt", "".join(f"{i % 2} 1:0.5 7:{i}\n" for i in range(30)).encode(),
     "numbers of features .libsvm.", "the texts"),
    ("rows.csv", table(["path", "speaker"], [[f"a/{i}.wav", "xy"[i % 2]] for i in range(30)])
     .encode(), "files of sound or pictures .`path`: a/0.wav", "--text COLUMN"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "what", "hint"), FOREIGN)
@pytest.mark.parametrize("model", ["encoder", "llama"])
def test_files_of_other_kinds_are_named(
    name: str, content: bytes, what: str, hint: str, model: str, init: Init, tmp_path: Path
) -> None:
    with pytest.raises(LoraError, match=what) as caught:
        init(name, content, model)
    assert hint in (caught.value.problems[0].hint or "")
    assert not (tmp_path / "recipe.yaml").exists()


OPINIONS = list(zip(texts(40), ["good", "bad"] * 20, strict=True))
OTHER_TABLES = [
    ("rows.md", "| text | label |\n|:-----|---:|\n" + "".join(
        f"| {text} | {label} |\n" for text, label in OPINIONS), "a table of Markdown"),
    ("rows.md.gz", "text | label\n-- | --\n" + "".join(
        f"{text} | {label}\n" for text, label in OPINIONS), "a table of Markdown"),
    ("rows.dat", "text::label\n" + "".join(
        f"{text}::{label}\n" for text, label in OPINIONS), "`::` divides each line"),
    ("rows.txt", "text +++$+++ label\n" + "".join(
        f"{text} +++$+++ {label}\n" for text, label in OPINIONS), ". divides each line"),
    ("rows.csv", table(["text", "label"], [[repr(text.encode()), label] for text, label in
        OPINIONS]), "`text` is written as Python writes bytes"),
    ("rows.tsv", table(["text", "label"], [[repr(text.encode()), label] for text, label in
        OPINIONS], "\t"), "`text` is written as Python writes bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "what"), OTHER_TABLES)
def test_the_hint_for_a_table_of_another_kind_writes_one_that_is_read(
    name: str, content: str, what: str, init: Init, tmp_path: Path
) -> None:
    raw = content.encode()
    with pytest.raises(LoraError, match=what) as caught:
        init(name, gzip.compress(raw) if name.endswith(".gz") else raw)
    run_hint(caught.value, tmp_path)
    written = next(path for path in (tmp_path / "rows.tsv", tmp_path / "decoded.csv")
                   if path.is_file() and path.name != name)  # fmt: skip
    assert said(init(written.name, written)) == PLAIN
    delimiter = "\t" if written.suffix == ".tsv" else ","
    rows = list(csv.reader(written.read_text().splitlines(), delimiter=delimiter))
    assert [tuple(row) for row in rows[1:]] == OPINIONS


def test_names_with_two_colons_are_not_columns(init: Init) -> None:
    rows = [{"text": f"std::{text}", "label": ["bad", "good"][i % 2]}
            for i, text in enumerate(texts(40))]  # fmt: skip
    assert said(init("rows.jsonl", lines(rows))) == PLAIN


def test_fields_separated_by_a_control_character_are_a_table(init: Init) -> None:
    content = "".join(f"{i}\x01{text}\x01{label}\n" for i, (text, label) in enumerate(OPINIONS))
    recipe = init("rows.txt", content)
    assert (recipe.data.format.delimiter, recipe.task.labels) == ("\x01", ["bad", "good"])


# ---------------------------------------------------------------------------------- too little data


@pytest.mark.parametrize("model", ["encoder", "llama"])
def test_a_single_class(init: Init, model: str) -> None:
    content = table(["text", "label"], labelled(40, ["a"]))
    if model == "llama":
        assert said(init("rows.csv", content, model)) == {
            "type": "causal_lm",
            "text_column": "text",
        }
        return
    with pytest.raises(LoraError, match="`label` has one value only, `a`"):
        init("rows.csv", content)


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 0), ("vocab_size", 0), ("hidden_act", "gelux")]
)
def test_a_base_that_cannot_be_built_gets_no_recipe(
    key: str, value: object, init: Init, tmp_path: Path
) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {key: value}
    (base / "config.json").write_text(json.dumps(config))
    text = "".join(f"{text.replace(',', '')},{i % 2}\n" for i, text in enumerate(tiny.CORPUS))
    with pytest.raises(LoraError, match=rf"`{key}` in config.json is `?{value}") as caught:
        init("a.csv", "text,label\n" + text, str(base))
    assert caught.value.problems[0].at == f"model.name (--model {base})"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_repeated_header_is_not_a_row(mark: str, init: Init, tmp_path: Path) -> None:
    half = table(["text", "label"], ROWS[:20]), table(["text", "label"], ROWS[20:])
    recipe = init("joined.csv", half[0] + mark + half[1])
    assert said(recipe) == PLAIN
    assert recipe.data.on_bad_row == "skip"
    recipe = recipe.with_values({"data.validation": None, "data.test": None})
    rows = load_rows(recipe)["train"]
    expected = pandas.read_csv(tmp_path / "joined.csv")
    expected = expected[~expected["text"].str.strip("\ufeff").eq("text")]
    assert [[row["text"], row["label"]] for row in rows] == expected.values.tolist()
    (skipped,) = rows.skipped
    assert "it is the header again" in skipped


@pytest.mark.parametrize("index", [True, False])
def test_a_header_of_numbers_written_by_pandas(index: bool, init: Init, tmp_path: Path) -> None:
    frame = pandas.DataFrame([[text, label] for text, label in ROWS])
    frame.to_csv(tmp_path / "rows.csv", index=index)
    recipe = init("", tmp_path / "rows.csv")
    assert said(recipe) == classification("0", "1", ["bad", "good"])
    recipe = recipe.with_values({"data.validation": None, "data.test": None})
    read = [[row["0"], row["1"]] for row in load_rows(recipe)["train"]]
    assert read == frame.values.tolist()


def test_nulls_of_mysql_are_not_a_label(init: Init) -> None:
    rows = [[text, "\\N" if i % 5 == 0 else label] for i, (text, label) in enumerate(ROWS)]
    result = init("dump.csv", table(["text", "label"], rows)).task
    assert (result.labels, result.skip_labels) == (["bad", "good"], ["\\N"])


def test_a_table_of_texts_with_tags_is_not_conll(init: Init) -> None:
    rows = [["Ann is here", "B-PER O O"], ["see Ann Lee", "O B-PER I-PER"]] * 20
    with pytest.raises(LoraError, match="each word of the text `text` has a tag in `labels`"):
        init("ner.csv", table(["text", "labels"], rows))


def test_three_rows(init: Init) -> None:
    recipe = init("rows.csv", table(["text", "label"], labelled(3, ["a", "b"])))
    assert said(recipe) == classification("text", "label", ["a", "b"])
    assert recipe.data.validation is None
    with pytest.raises(LoraError, match="no label") as caught:
        init("more.csv", table(None, labelled(3, ["a", "b"])))
    assert "`column_2`: 2 values" in (caught.value.problems[0].hint or "")


# -------------------------------------------------------------------------------------- encodings

WEST = [
    "Das Gerät wurde zurückgeschickt, die Rückerstattung fehlt für größere Beträge",
    "La película es muy buena, la señora actúa con corazón y emoción, ¿por qué no?",
    "As situações são difíceis e as opções não são boas, mas a direção é ótima",
    "Det er en god film, men slutningen på filmen gør ondt, så jeg gik",
    "Perché la qualità è così bassa? Però più avanti migliorerà, città e libertà",
    "Filmen är väldigt bra men åskådarna förstår inte slutet på berättelsen",
]
EAST = [
    "Příliš žluťoučký kůň úpěl ďábelské ódy, film se mi velmi líbil",
    "Zażółć gęślą jaźń; film był bardzo dobry, polecam każdemu",
    "A film nagyon jó volt, a színészek kitűnően játszottak, de a vége túl hosszú, őrült",
    "Filmul este foarte bun, actorii joacă bine şi povestea mă ţine până la sfârşit",
    "Film je odličan, glumci su sjajni, ali priča je preduga i sve je đavolski čudno",
]


@pytest.mark.parametrize(
    ("text", "encoding"), [*((t, "cp1252") for t in WEST), *((t, "cp1250") for t in EAST)]
)
def test_two_encodings_of_the_same_bytes(text: str, encoding: str) -> None:
    raw = "".join(f"good film, number {i};bad\n{text};good\n" for i in range(12)).encode(encoding)
    result, why = encoding_of(raw)
    assert raw.decode(result) == raw.decode(encoding)
    assert why.split("`")[1] in text.replace(",", "")


RUSSIAN = ["Фильм очень хороший, актёры играют прекрасно", "Скучно и слишком долго, не советую"]


@pytest.mark.parametrize("encoding", ["cp1251", "koi8_r", "cp866", "iso8859_5"])
def test_encodings_of_russian(encoding: str) -> None:
    raw = "".join(f"{i},{text}\n" for i, text in enumerate(RUSSIAN * 5)).encode(encoding)
    assert raw.decode(encoding_of(raw)[0]) == raw.decode(encoding)


@pytest.mark.parametrize("own", ["cp932", "utf-8", "koi8_r", "cp1252"])
def test_control_characters_of_a_wrong_encoding(own: str, tmp_path: Path) -> None:
    text = {"cp932": "商品を返品したいです", "cp1252": "“well” – he said…"}.get(own, RUSSIAN[0])
    file = tmp_path / "rows.txt"
    file.write_bytes(f"{text}\n{text}\n".encode(own))
    if own == "koi8_r":  # all of its letters beyond ASCII are also letters in latin-1
        assert len(list(read_lines(file, "latin-1"))) == 2
        return
    with pytest.raises(LoraError, match="read as iso8859-1, the text has") as caught:
        list(read_lines(file, "latin-1"))
    hint = caught.value.problems[0].hint or ""
    assert f"encoding={own}" in hint


def test_a_rare_control_character_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes("é".encode("latin-1") * 200 + b"\x93\n")
    assert len(list(read_lines(file, "latin-1"))) == 1
    assert "the text has 1 control character" in capsys.readouterr().err


def test_undecodable_bytes_are_counted_not_tokenized(init: Init, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = pa.array([b"\xff\xfe", *(text.encode() for text in TEXTS[1:])], pa.binary())
    bad = pa.StringArray.from_buffers(len(values), *values.buffers()[1:])
    table_of_bytes = pa.table({"text": bad, "label": [label for _, label in ROWS]})
    pq.write_table(table_of_bytes, tmp_path / "bad.parquet")
    recipe = init("bad.parquet", tmp_path / "bad.parquet")
    assert recipe.data.on_bad_row == "skip"


def test_names_too_rare_for_validation_are_not_labels(init: Init) -> None:
    rows = [[text, f"name {i % 120}"] for i, text in enumerate(texts(240))]
    with pytest.raises(LoraError, match="has 120 values in 240 rows: no label"):
        init("rows.csv", table(["text", "label"], rows))
    rows = [[text, f"name {i % 96}"] for i, text in enumerate(texts(240))]
    recipe = init("rows.csv", table(["text", "label"], rows))
    check_data(build_task(recipe), ("train", "validation", "test"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("flat.jsonl", lines([{"data": {"text": "a", "label": "b"}}] * 3)),
        ("rows.jsonl", '["a film", "b"]\n["the film", "c"]\n'),
        ("messages.jsonl", lines([{"chats": [{"role": "user", "text": "a b c"}]}] * 3)),
    ],
)
def test_a_command_never_overwrites_its_input(
    name: str, content: str, tmp_path: Path, bases: dict[str, Path]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraError, match=rf"{name} > new_{name}`"):
        draft_recipe(tmp_path / name, str(bases["llama"]), tmp_path / "recipe.yaml")
