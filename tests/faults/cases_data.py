"""Faults of files, rows, splits, labels and conversations."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from cases import CASES, Case, case
from world import TABLE, Printed, World

CUT = gzip.compress(TABLE.encode() * 500)[:-20]
LONG = "".join(f"{'many words and more ' * 9}{i},{i}\n" for i in range(6))

# -------------------------------------------------------------------------------------- the data

Make = Callable[[Path], None]
JSON = '{"text": "a film", "label": "good"}\n'


def _parquet(*names: str) -> bytes:
    """Return a parquet file of a row."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]) for _ in names], names), file)
    return file.getvalue()


FILES: dict[str, tuple[str, str | bytes | Make]] = {
    "an empty file": ("rows.csv", ""),
    "a header and no rows": ("rows.csv", "text,label\n"),
    "no such file": ("rows.cvs", lambda folder: None),
    "no such file, and none like it": ("data/train.csv", lambda folder: None),
    "a pattern that matches nothing": ("parts/*.csv", lambda folder: (folder / "parts").mkdir()),
    "a link to nothing": ("rows.csv", lambda folder: (folder / "rows.csv").symlink_to("gone.csv")),
    "a pipe": ("rows.csv", lambda folder: os.mkfifo(folder / "rows.csv")),
    "a device": ("/dev/zero", lambda folder: None),
    "a name that is too long": ("x" * 300 + ".csv", lambda folder: None),
    "a disk's error": ("/proc/self/mem", lambda folder: None),
    "an empty folder": ("rows", lambda folder: (folder / "rows").mkdir()),
    "a spreadsheet": ("rows.xlsx", b"PK\x03\x04"),
    "a file of unknown kind": ("rows.dat", TABLE),
    "a spreadsheet called csv": ("rows.csv", b"PK\x03\x04\x14\0"),
    "a gzip file called csv": ("rows.csv", gzip.compress(TABLE.encode())),
    "a parquet file called csv": ("rows.csv", b"PAR1" + b"\0" * 99),
    "a csv file called gz": ("rows.csv.gz", TABLE),
    "a gzip file that is cut": ("rows.csv.gz", CUT),
    "a csv file called parquet": ("rows.parquet", TABLE),
    "a parquet file that is cut": ("rows.parquet", b"PAR1" + b"\0" * 99),
    "two columns of a name in parquet": ("rows.parquet", _parquet("text", "text")),
    "UTF-16": ("rows.csv", TABLE.encode("utf-16")),
    "UTF-16 without its mark": ("rows.csv", TABLE.encode("utf-16-be")),
    "UTF-32": ("rows.csv", b"\xff\xfe\0\0" + TABLE.encode("utf-32-le")),
    "ISO-2022-JP": ("rows.csv", (TABLE + "返品,good\n").encode("iso2022_jp")),
    "cp932": ("rows.csv", (TABLE + "返品したいです,good\n").encode("cp932")),
    "zeros": ("rows.csv", b"\0" * 100),
    "another encoding": ("rows.csv", "text,label\nna\xefve,good\nfine,bad\n".encode("latin-1")),
    "two columns of a name": ("rows.csv", "text,label,text\na,b,c\n"),
    "a header with an open quotation mark": ("rows.csv", 'text,"label\na,b\n'),
    "another delimiter": ("rows.csv", TABLE.replace(",", ";")),
    "another column": ("rows.csv", TABLE.replace("text", "txet", 1)),
    "too few and too many fields": ("rows.csv", TABLE + "one\nwell, yes,good\n"),
    "an open quotation mark": ("rows.csv", TABLE + '"never closed,good\nfine,bad\n'),
    "blank and missing values": ("rows.jsonl", JSON + '{"text": " ", "label": "a"}\n'
        '{"text": "\u200b", "label": "a"}\n{"text": NaN, "label": "a"}\n{"label": "a"}\n'),
    "values of other types": ("rows.jsonl", JSON + '{"text": [], "label": "a"}\n'
        '{"text": {}, "label": "a"}\n{"text": true, "label": "a"}\n{"text": "a", "label": []}\n'),
    "lines that are no JSON": ("rows.jsonl", JSON + '{"text": "a", "lab\n{"text": "a",\n'
        + JSON.strip() + ",\n" + JSON.strip() + " {}\n{'text': 'a'}\n" + '{"text": "a",}\n'
        '{"text" "a"}\n{"text": "\\x"}\n{"text": "a\tb"}\n{"text": ' + "9" * 5000 + "}\n"),
    "lines that are no objects": ("rows.jsonl", '["a"]\n'.replace("[", " {").replace("]", ": 1}")
        + '"a"\n3\nnull\ntrue\n' + "[" * 100_000 + "\n"),
    "a key twice in a line": ("rows.jsonl", JSON + '{"text": "a", "text": "b", "label": "a"}\n'),
    "half of a character in a line": ("rows.jsonl", JSON + '{"text": "\\ud800", "label": "a"}\n'),
    "a list that is cut": ("rows.json", "[" + JSON.strip() + ",\n" + JSON.strip()),
    "a list in another encoding": ("rows.json", '[\n{"text": "na\xefve"}]'.encode("latin-1")),
    "an object for a list": ("rows.json", '{"data":\n[' + JSON.strip() + "]\n}"),
    "many bad rows": ("rows.csv", TABLE + "one\n" * 15),
}  # fmt: skip


def _data(name: str, content: Any, sections: Any, *flags: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        if callable(content):
            content(world.folder)
            world.write("rows.csv", TABLE) if name == "rows.cvs" else None
        else:
            world.write(name, content)
        recipe = world.recipe(**{"data": {"path": name}, **sections})
        return world.lora("validate", recipe, *flags)

    return run


for _name, (_file, _content) in FILES.items():
    # a mark that is not closed is a letter like others, unless the file is said to be csv
    _flags = ["--set", "data.format.quoting=csv"] if "quotation mark" in _name else []
    CASES.append(Case("Files and rows", _name, _data(_file, _content, {}, *_flags)))

DATA: dict[str, dict[str, Any]] = {
    "UTF-8 that is called UTF-16": {"format": {"encoding": "utf-16"}},
    "other names for the columns": {"format": {"columns": ["a", "b", "c"]}},
    "a slice that is none": {"train": "rows.csv[80]"},
    "a slice without rows": {"train": "rows.csv[5:5]"},
    "a file with the parameters of an address": {"train": "rows.csv?token=secret"},
    "a split that is not there": {"path": "rows.csv", "test": "test"},
    "a folder without the split": {"path": ".", "train": "training", "test": "final"},
    "a draw from no split": {"path": "rows.csv", "validation": {"from": "dev", "fraction": 0.1}},
    "a draw that leaves nothing": {"path": "rows.csv", "validation": {"fraction": 0.001}},
    "a draw by another column": {
        "path": "rows.csv", "validation": {"fraction": 0.5, "group_by": "user"},
    },
    "a split column that is not there": {"path": "rows.csv", "split_column": "part"},
    "a split column without the split": {"path": "rows.csv", "split_column": "label"},
    "a leak": {"path": "rows.csv", "test": "rows.csv"},
    "a Hub data set that is not there": {"name": "nobody/nothing"},
}  # fmt: skip
for _name, _section in DATA.items():
    _show = ["--data"] if _name == "a leak" else []
    _made = {"data": _section if {"path", "name"} & set(_section) else {"path": ".", **_section}}
    if _name.startswith(("UTF-8", "other")):
        _made = {"data": {"path": "rows.csv", **_section}}
    CASES.append(Case("Splits", _name, _data("rows.csv", TABLE, _made, *_show)))


def _hub_folder(cached: str, **data: Any) -> Callable[[World], Printed]:
    """Return a command on a folder laid out like a data set on the Hub.

    Args:
        cached: The cache of `datasets` has rows that were prepared of it, as rows of this set.
        data: Of the recipe.
    """

    def run(world: World) -> Printed:
        import datasets

        world.write("films/train.csv", TABLE)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(world.folder)
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", world.folder / "cache")
            if cached:
                rows = datasets.load_dataset("./films", split="train")
                prepared = Path(rows.cache_files[0]["filename"]).parent
                if cached != "films":
                    new = world.folder / "cache" / cached / "default" / "0.0.0" / ("a" * 40)
                    new.parent.mkdir(parents=True)
                    prepared.rename(new)
                (world.folder / "films").rename(world.folder / "moved")
            model = {"name": "../../bases/encoder"}
            recipe = world.recipe(name="sub/recipe.yaml", model=model, data=data)
            return world.lora("validate", recipe, "--data")

    return run


for _name, _cached, _section in (
    ("a folder that has no revision", "", {"name": "../films", "revision": "v2"}),
    ("a folder in the working directory", "", {"name": "films"}),
    ("a Hub set of which a folder is cached", "films", {"name": "films"}),
    ("a Hub set in another revision", "org___films", {"name": "org/films", "revision": "b" * 40}),
):
    CASES.append(Case("Splits", _name, _hub_folder(_cached, **_section)))


@case("Files and rows", "more names than a parquet file has columns")
def _(world: World) -> Printed:
    world.write("rows.parquet", _parquet("text", "label"))
    data = {"path": "rows.parquet", "format": {"columns": ["a", "b", "c"]}}
    return world.lora("validate", world.recipe(data=data))


@case("Splits", "only rows that cannot be read")
def _(world: World) -> Printed:
    world.write("rows.csv", "text,label\none\ntwo\n")
    return world.lora("validate", world.recipe(), "--set", "data.on_bad_row=skip")


@case("Splits", "only rows that cannot be used")
def _(world: World) -> Printed:
    world.write("rows.csv", "text,label\n,a\n,b\n")
    return world.lora("validate", world.recipe(), "--set", "data.on_bad_row=skip")


@case("Splits", "a bad row of a stream")
def _(world: World) -> Printed:
    world.write("rows.csv", "text,label\na,good\none\n")
    data = {"path": "rows.csv", "streaming": True}
    return world.lora("train", world.recipe(data=data, task={"labels": ["bad", "good"]}))


def _stream(rows: str, *flags: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.write("rows.csv", rows)
        data = {"path": "rows.csv", "streaming": True}
        recipe = world.recipe(data=data, task={"labels": ["bad", "good"]})
        return world.lora("train", recipe, *flags)

    return run


CASES.append(Case("Splits", "a stream without rows", _stream("text,label\n")))
CASES.append(Case("Splits", "a stream without rows that can be used", _stream(
    "text,label\n,good\none\n", "--set", "data.on_bad_row=skip")))  # fmt: skip
CASES.append(Case("Labels", "unknown, in a stream", _stream(TABLE + "a film,ugly\n")))


@case("Splits", "a stream without the split")
def _(world: World) -> Printed:
    world.write("rows.csv", TABLE)
    data = {"path": "rows.csv", "split_column": "label", "streaming": True}
    return world.lora("train", world.recipe(data=data, task={"labels": ["bad", "good"]}))


@case("Splits", "a folder that may not be looked into")
def _(world: World) -> Printed:
    world.recipe()
    os.chmod(world.folder, 0o755)
    with _as_nobody(world, "rows.csv"):
        return world.lora("validate", "recipe.yaml")


@contextmanager
def _as_nobody(world: World, name: str) -> Iterator[None]:
    """Take away the right to read a file, also from root, who has every right."""
    file = world.folder / name
    mode = file.stat().st_mode
    file.chmod(0)
    is_root = os.geteuid() == 0
    folders = [world.folder, *world.folder.parents]
    closed = [f for f in folders if is_root and not f.stat().st_mode & 0o001]
    modes = {folder: folder.stat().st_mode for folder in closed}
    for folder in closed:
        folder.chmod(modes[folder] | 0o011)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for folder, before in modes.items():
            folder.chmod(before)
        file.chmod(mode)


# ---------------------------------------------------------------------------------------- labels


def _lines(*labels: Any) -> str:
    return "".join(json.dumps({"text": f"film {i}", "label": label}) + "\n"
                   for i, label in enumerate(labels))  # fmt: skip


TWO = {"labels": ["bad", "good"]}
MANY = {"problem": "multi_label"}
NUMBER = {"problem": "regression"}
LABELS: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown": (_lines("bad", "good", "godo", "godo", "ugly"), TWO),
    "unknown, as other letters": (_lines("Bad", "good"), TWO),
    "positions that are not there": (_lines(0, 1, 2, -1), TWO),
    "a fraction for a position": (_lines(0.0, 1.0, 0.5), TWO),
    "many that are unknown": (_lines("bad", *(f"x{i}" for i in range(15))), TWO),
    "one only": (_lines("good", "good", " good "), {}),
    "as many as rows": (_lines(*(f"id {i}" for i in range(60))), {}),
    "blank": (_lines("good", None, "", " ", float("nan"), "bad"), {}),
    "lists": (_lines("good", ["bad"], {"a": 1}), {}),
    "none of many": (_lines([], []), MANY),
    "a blank among many": (_lines(["a"], ["b", None]), MANY),
    "text for many": (_lines(["a"], "b,c"), MANY),
    "a 0 or 1 for each of many": (_lines(["a"], [1, 0, 1]), MANY),
    "no list of many": (_lines(["a"], None), MANY),
    "no number": (_lines(1, "one", None, [1], True, "1,5", "1_0", float("inf"), "1e99"), NUMBER),
    "a weight of no label": (_lines("good", "bad"), {"class_weights": {"godo": 2.0, "bad": -1.0}}),
}
for _name, (_content, _task) in LABELS.items():
    CASES.append(Case("Labels", _name, _data("rows.jsonl", _content, {"task": _task})))


@case("Labels", "only in validation")
def _(world: World) -> Printed:
    world.write("dev.jsonl", _lines("good", "never seen"))
    recipe = world.recipe(data={"train": "./rows.csv", "validation": "./dev.jsonl"})
    world.write("rows.csv", TABLE)
    return world.lora("validate", recipe)


@case("Labels", "columns of 0 and 1")
def _(world: World) -> Printed:
    marks = [(1, 0), (0, 1), (1, 1), (0, 0), (2, 0), (None, 1), ("yes", 0)]
    world.write("rows.jsonl", "".join(
        json.dumps({"text": f"film {i}", "a": a, "b": b}) + "\n" for i, (a, b) in enumerate(marks)
    ))  # fmt: skip
    return world.lora("validate", world.recipe(
        data={"path": "rows.jsonl"}, task={"label_columns": ["a", "b"]}))  # fmt: skip


@case("Labels", "columns that are not there")
def _(world: World) -> Printed:
    return world.lora("validate", world.recipe(task={"label_columns": ["bad", "good"]}))


@case("Labels", "that a stream cannot know")
def _(world: World) -> Printed:
    world.write("rows.csv", TABLE)
    return world.lora("train", world.recipe(data={"path": "rows.csv", "streaming": True}))


def _streamed(rows: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.write("rows.csv", rows)
        data = {"path": "rows.csv", "streaming": True, "on_bad_row": "skip"}
        return world.lora("train", world.recipe(data=data, task={"labels": ["bad", "good"]}))

    return run


CASES += [
    Case("Labels", "one in a stream that is none", _streamed("text,label\na,good\nb,godo\n")),
    Case("Files and rows", "a stream without rows", _streamed("text,label\n")),
    Case("Files and rows", "a stream of bad rows", _streamed("text,label\na,\n,good\n")),
]


@case("Labels", "that all weigh nothing")
def _(world: World) -> Printed:
    weights = {"bad": 0.0, "good": 0.0}
    return world.lora("validate", world.recipe(task={"class_weights": weights}))


# ------------------------------------------------------------------------------- language models

PAIR = {"prompt_column": "prompt", "completion_column": "answer", "text_column": ...}
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
FINE = json.dumps({"messages": [{"role": "user", "content": "hi"},
                                {"role": "assistant", "content": "yes"}]}) + "\n"  # fmt: skip
TWICE = json.dumps({"messages": json.loads(FINE)["messages"] * 2}) + "\n"


def _chat(rows: str, template: str | None, **task: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.write("rows.jsonl", rows)
        keys = {"messages_column": "messages", "text_column": ...}
        if template is not None:
            keys["chat_template"] = world.write("chat.jinja", template)
        recipe = world.recipe("llama", data={"path": "rows.jsonl"}, task={**keys, **task})
        return world.lora("validate", recipe)

    return run


CHATS: dict[str, tuple[str, str | None]] = {
    "no chat template": (FINE, None),
    "a template that is no Jinja": (FINE, "{% for %}"),
    "a template that refuses": (FINE, "{{ raise_exception('roles must alternate') }}"),
    "a template that rewrites turns": (
        TWICE, "{% for m in messages %}{{ loop.length }} {{ m.content }} {% endfor %}"
    ),
    "a template that leaves the reasoning out": (
        FINE.replace("yes", "<think>why?</think>yes"),
        TURNS.replace("content", "content.split('</think>')[-1]"),
    ),
    "a template that leaves the answers out": (FINE, "{{ messages[0].content }}"),
    "conversations that are none": ('{"messages": []}\n{"messages": "hi"}\n{"messages": [1]}\n'
        '{"messages": [{"role": "user"}]}\n{"messages": [{"from": "human", "value": "hi"}]}\n'
        '{"messages": [{"role": "user", "content": 3}]}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}\n', TURNS),
}  # fmt: skip
for _name, (_rows, _template) in CHATS.items():
    CASES.append(Case("Language models", _name, _chat(_rows, _template)))
THOUGHT = json.dumps({"messages": [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes", "reasoning_content": "a greeting"},
]}) + "\n"  # fmt: skip
CASES.append(Case("Language models", "reasoning that is left out", _chat(THOUGHT, TURNS)))
CASES.append(Case("Language models", "speakers that are not known", _chat(
    '{"messages": [{"from": "nobody", "value": "hi"}]}\n{"messages": [{"from": "human"}]}\n',
    TURNS, format="sharegpt")))  # fmt: skip
CASES.append(
    Case("Language models", "no such template", _chat(FINE, None, chat_template="x.jinja"))
)


@case("Language models", "prompts that leave nothing to train")
def _(world: World) -> Printed:
    world.write("rows.csv", "prompt,answer\n" + LONG)
    return world.lora("train", world.recipe("llama", task=PAIR))


@case("Language models", "a padding token that is not there")
def _(world: World) -> Printed:
    return world.lora("validate", world.recipe("llama", task={"pad_token": "<nothing>"}))


@case("Language models", "a padding token that is not there, for labels")
def _(world: World) -> Printed:
    return world.lora("train", world.recipe(task={"pad_token": "<nothing>"}))


@case("Language models", "metrics of answers without prompts")
def _(world: World) -> Printed:
    return world.lora("validate", world.recipe("llama", evaluate={"metrics": ["exact_match"]}))


def _pattern(
    pattern: str, of_metrics: list[str] | None = None, **task: Any
) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        rows = [{"q": text, "a": f"so #### {i}"} for i, text in enumerate(tiny.CORPUS)]
        world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        pair = {"text_column": ..., "prompt_column": "q", "completion_column": "a"}
        return world.lora("validate", world.recipe(
            "llama", task={**pair, "answer_pattern": pattern, **task},
            data={"path": "rows.jsonl", "validation": {"fraction": 0.5}},
            evaluate={"metrics": of_metrics}))  # fmt: skip

    return run


for _name, _run in {
    "a pattern of final answers that is no expression": _pattern("#### ([0-9"),
    "a pattern of final answers that no row has": _pattern("The answer is (.*)"),
    "a pattern of final answers that no metric uses": _pattern("#### (.*)", ["perplexity"]),
    "a pattern of final answers in plain texts": _pattern(
        "#### (.*)", prompt_column=..., completion_column=..., text_column="q"
    ),
}.items():
    CASES.append(Case("Language models", _name, _run))


@case("Language models", "missing final answers without a pattern")
def _(world: World) -> Printed:
    pair = {"text_column": ..., "prompt_column": "text", "completion_column": "label"}
    return world.lora(
        "validate", world.recipe("llama", task=pair, evaluate={"metrics": ["no_answer"]})
    )


@case("Language models", "metrics of answers where all is trained")
def _(world: World) -> Printed:
    world.write("rows.jsonl", FINE)
    world.write("chat.jinja", TURNS)
    task = {"messages_column": "messages", "text_column": ..., "chat_template": "chat.jinja"}
    return world.lora("validate", world.recipe(
        "llama", data={"path": "rows.jsonl"}, task={**task, "train_on": "all"},
        evaluate={"metrics": ["exact_match"]}))  # fmt: skip


@case("Files and rows", "an encoding that is not the file's")
def _controls(world: World) -> Printed:
    world.write(
        "rows.csv", "text,label\n商品を返品したいです,good\n届きません,bad\n".encode("cp932")
    )
    data = {"path": "rows.csv", "format": {"encoding": "latin-1"}}
    return world.lora("validate", world.recipe(data=data))


# ------------------------------------------------------------------------------ a recipe from data

INIT: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "an empty file": ("rows.csv", "", ()),
    "a file that is not there": ("", "", ()),
    "a folder without data": ("folder/image.jpg", b"\xff\xd8\xff", ()),
    "a prompt with a context": (
        "rows.jsonl", "".join(json.dumps({"instruction": f"answer question {i} in a few words",
                                          "context": f"a long context {i} of some words",
                                          "document": f"a long document {i} of some words",
                                          "response": f"an answer {i} of some words"}) + "\n"
                              for i in range(30)), ("--model", "../bases/llama")),
    "texts with commas and no quotes": (
        "rows.csv", "label,text\n" + "".join(f"{'ab'[i % 2]},a film, really {i}\n"
                                             for i in range(30)), ()),
    "a table of words": (
        "rows.csv", "Sentence #,Word,POS,Tag\n" + "".join(
            f"{f'Sentence: {i}' if i % 5 == 0 else ''},word{i},NN,{'O' if i % 5 else 'B-geo'}\n"
            for i in range(60)), ()),
    "lists of answers": (
        "rows.jsonl", "".join(json.dumps({"question": f"what is it that has the number {i}",
                                          "answer": [f"an answer {i}", f"one more {i}"]}) + "\n"
                              for i in range(30)), ("--model", "../bases/llama")),
    "spans with inclusive ends": (
        "rows.jsonl", "".join(json.dumps({"text": f"see film {i} now",
                                          "spans": [[4, 7, "ART"]]}) + "\n"
                              for i in range(30)), ()),
    "messages of conversations": (
        "rows.jsonl", "".join(json.dumps({"message_id": f"m{i}", "parent_id": None, "role": "user",
                                          "text": f"a message {i}"}) + "\n" for i in range(9)), ()),
    "a pair without a label": (
        "rows.csv", "one,two\n" + "".join(f"a long text {i} of some words,another text {i} of us\n"
                                          for i in range(30)),
        ("--text", "one", "--pair", "two")),
    "a model that the memory cannot hold": (
        "rows.csv", TABLE, ("--memory", "1", "--model", "x-8B")),
    "a gzip file that is cut": ("rows.csv.gz", CUT, ()),
    "a file of control characters": ("rows.csv", bytes(range(1, 32)) * 20, ()),
    "control characters": ("rows.csv", bytes(range(1, 32)) * 20, ()),
    "only rows that cannot be read": ("rows.jsonl", '{"a"\n{"b"\n', ()),
    "more bad rows than good ones": ("rows.jsonl", JSON + '{"a"\n{"b"\n', ()),
    "no such column": ("rows.csv", TABLE, ("--text", "txet")),
    "no column of text": ("rows.csv", "a,b\n" + "1,2\n" * 9, ()),
    "two columns that may be the text": (
        "rows.csv",
        "one,two\n" + "".join(f"a long text {i} of some words,another text {i} of words\n"
                              for i in range(30)), ()),
    "two columns that may be the label": (
        "rows.csv",
        "text,kind,sort\n" + "".join(f"a long text {i} of some words,{'ab'[i % 2]},{'xyz'[i % 3]}\n"
                                     for i in range(30)), ()),
    "no label for an encoder": (
        "rows.txt", "".join(f"a long text {i} of some words\n" for i in range(30)), ()),
    "a label that holds something else": (
        "rows.jsonl", '{"text": "a film", "label": {"a": 1}}\n' * 9, ("--label", "label")),
    "a label of one value": ("rows.csv", TABLE.replace("bad", "good"), ("--label", "label")),
    "a label of many values": (
        "rows.csv", "text,label\n" + "".join(f"a text {i},value {i}\n" for i in range(60)),
        ("--label", "label")),
    "a number that is none": (
        "rows.csv", "text,score\n" + "".join(f"a long text {i} of some words,{i / 8}\n"
                                              for i in range(30)) + "a last text,1.5k\n", ()),
    "two columns of a name in parquet": ("rows.parquet", _parquet("text", "label", "label"), ()),
    "answers inside objects": (
        "rows.jsonl", "".join(json.dumps({"question": f"what is number {i} of all",
                                          "answers": {"text": ["a"]}}) + "\n"
                              for i in range(30)), ()),
    "choices": (
        "rows.jsonl", "".join(json.dumps({"question": f"which is number {i} of all",
                                          "choices": ["a", "b"], "answer": i % 2}) + "\n"
                              for i in range(30)), ()),
    "choices in columns": (
        "rows.csv", "goal,sol1,sol2,label\n" + "".join(
            f"how to do number {i},by a way of {i},by another way of {i},{i % 2}\n"
            for i in range(30)), ()),
    "a list of positives": (
        "rows.jsonl", "".join(json.dumps({"query": f"which is number {i} of all",
                                          "pos": [f"number {i}", "it"], "neg": ["none"]}) + "\n"
                              for i in range(30)), ()),
    "a score for each label": (
        "rows.jsonl", "".join(json.dumps({"text": f"a long text {i} of some words",
                                          "labels": [0.1, 0.9]}) + "\n" for i in range(30)), ()),
    "columns of pandas": (
        "rows.json", json.dumps({"text": {str(i): f"text {i}" for i in range(30)},
                                 "label": {str(i): "ab"[i % 2] for i in range(30)}}), ()),
    "tags of the words of a text": (
        "rows.jsonl", '{"text": "see Ann Lee", "labels": "O B-PER I-PER"}\n' * 20, ()),
    "places that count words": (
        "rows.jsonl", '{"tokenized_text": ["Ann", "Lee"], "ner": [[0, 1, "PER"]]}\n' * 20, ()),
    "labels that are objects as text": (
        "rows.csv", "text,label\n" + "".join(
            f'a long text {i} of some words,"{{""is"": ""{"ab"[i % 2]}""}}"\n'
            for i in range(30)), ()),
    "answers to be ranked": (
        "rows.jsonl", "".join(json.dumps({"prompt": f"say something about number {i}",
                                          "responses": ["a", "b"], "scores": [0.1, 0.9]}) + "\n"
                              for i in range(30)), ()),
    "labels inside other objects": (
        "rows.jsonl", "".join(json.dumps({"text": f"a long text {i} of some words",
                                          "writer": {"joy": 1, "anger": 0}}) + "\n"
                              for i in range(30)), ()),
    "columns inside objects": (
        "rows.jsonl", '{"id": 1, "data": {"text": "a film", "label": "good"}}\n' * 9, ()),
    "labels inside objects": (
        "rows.jsonl", "".join(json.dumps({"text": f"a film, {i}", "label": {"name": "good"}}) + "\n"
                              for i in range(30)), ()),
    "a label of one value, that nobody named": (
        "rows.csv", "text,label\n" + "".join(f"a long text {i} of some words,a\n"
                                             for i in range(30)), ()),
    "a web page": ("rows.csv", "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", ()),
    "a pointer of Git LFS": ("rows.parquet", "version https://git-lfs.github.com/spec/v1\n", ()),
    "a pointer of Git LFS by the name of a gzip file": (
        "rows.csv.gz", "version https://git-lfs.github.com/spec/v1\n", ()),
    "a PDF": ("rows.pdf", b"%PDF-1.4\n", ()),
    "a picture": ("rows.csv", b"\x89PNG\r\n", ()),
    "a question inside an object": (
        "rows.jsonl", "".join(json.dumps({"id": f"q{i}", "question": {"stem": "where?"},
                                          "answerKey": "AB"[i % 2]}) + "\n"
                              for i in range(8)), ()),
    "an ARFF file": ("rows.arff", "@relation r\n@attribute t string\n@data\n'a film'\n", ()),
    "a libsvm file": ("rows.txt", "1 1:0.5 7:2\n0 3:1\n" * 9, ()),
    "a table of Markdown": ("rows.md", "| text | label |\n|---|---|\n" + "| a | x |\n" * 9, ()),
    "columns divided by two colons": ("rows.dat", "1::a film::x\n" * 9, ()),
    "texts written as bytes": (
        "rows.csv", "text,label\n" + "".join(f"b'a film {i} to see',{'ab'[i % 2]}\n"
                                             for i in range(30)), ()),
    "two texts whose names say nothing": (
        "rows.csv", "first,other\n" + "".join(
            f"a long text of some words {i} and more of them,a short text {i} of words\n"
            for i in range(30)), ("--model", "../bases/llama")),
    "bytes that are no text": ("rows.csv", bytes(range(1, 256)) * 9, ()),
    "lists of tokens and numbers of tags": (
        "rows.jsonl", '{"tokens": ["a", "b"], "tags": [0, 1]}\n' * 9, ()),
    "files of pictures": (
        "rows.csv", "image,label\n" + "".join(f"img/{i}.png,{'ab'[i % 2]}\n" for i in range(30)),
        ()),
}  # fmt: skip


def _init(name: str, content: str | bytes, flags: tuple[str, ...]) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        source = name or "nowhere.csv"
        if name:
            world.write(name, content)
        source = "folder" if name.startswith("folder") else source
        return world.lora("init", source, "--model", "../bases/encoder", *flags)

    return run


for _name, (_file, _content, _flags) in INIT.items():
    CASES.append(Case("lora init", _name, _init(_file, _content, _flags)))


def _folder(files: dict[str, str]) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        for name, content in files.items():
            world.write(f"folder/{name}", content)
        return world.lora("init", "folder", "--model", "../bases/llama")

    return run


CASES.append(Case("lora init", "a folder of files with other columns", _folder(
    {"a.csv": TABLE, "b.csv": TABLE.replace("text", "body")})))  # fmt: skip
CASES.append(Case("lora init", "a folder without a data file", _folder({"notes.bin": "x"})))
CASES.append(
    Case(
        "lora init",
        "a data set saved to disk",
        _folder({"state.json": "{}", "data-00000-of-00001.arrow": "x"}),
    )
)
README = (
    "---\nconfigs:\n- config_name: {}\n  data_files: {}\n- config_name: b\n  data_files: b.csv\n---"
)
CASES.append(
    Case(
        "lora init",
        "a folder of several data sets",
        _folder({"README.md": README.format("a", "a.csv"), "a.csv": TABLE, "b.csv": TABLE}),
    )
)
CASES.append(
    Case(
        "lora init",
        "a folder whose files the README names",
        _folder(
            {
                "README.md": README.format("a", "{train: a.csv, test: b.csv}").partition(
                    "- config_name: b"
                )[0]
                + "---",
                "a.csv": TABLE,
                "b.csv": TABLE,
            }
        ),
    )
)
CASES.append(
    Case(
        "lora init",
        "a folder of brat",
        _folder({"a.txt": "Ann is here", "a.ann": "T1\tPER 0 3\tAnn"}),
    )
)
CASES.append(Case("lora init", "a folder without train rows", _folder(
    {"test.csv": TABLE, "dev.csv": TABLE})))  # fmt: skip
CASES.append(Case("lora init", "a folder of translations", _folder(
    {"train.de.txt": "eins\nzwei\n", "train.en.txt": "one\ntwo\n"})))  # fmt: skip


@case("Labels", "no row with a label that counts")
def _(world: World) -> Printed:
    return world.lora("validate", world.recipe(task={"skip_labels": ["good", "bad"]}))


@case("lora init", "a pipe")
def _(world: World) -> Printed:
    os.mkfifo(world.folder / "rows.csv")
    return world.lora("init", "rows.csv", "--model", "../bases/encoder")


def _init_of(model: str, *flags: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.recipe()
        world.write("bad/config.json", "{")
        return world.lora("init", "rows.csv", "--model", model, *flags)

    return run


CASES.append(Case("lora init", "over a recipe", _init_of("../bases/encoder")))
CASES.append(Case("lora init", "into no folder", _init_of("../bases/encoder", "-o", "no/r.yaml")))
CASES.append(Case("lora init", "with no such model", _init_of("../bases/encodre", "-o", "r.yaml")))
CASES.append(Case("lora init", "with a model that cannot be read", _init_of("bad", "-o", "r.yaml")))
CASES.append(Case("lora init", "with a folder without a model", _init_of(".", "-o", "r.yaml")))


def _together(second: bytes, *more: str, model: str = "llama") -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.write("a.en", "one …\ntwo\n")
        world.write("a.de", second)
        for name in more:
            world.write(name, "one\n")
        files = [name for name in ("a.en", "a.de", *more) if name != "a.de" or "/" not in str(more)]
        return world.lora("init", *files, "--model", f"../bases/{model}")

    return run


for _name, _run in {
    "two files, one of which ends before": _together(b"eins\n"),
    "two files, one of which is empty": _together(b""),
    "two files in two encodings": _together("fünf Wörter über Bücher\nzwei\n".encode("cp1252")),
    "two files of two folders": _together(b"eins\n", "other/a.de"),
    "two files for an encoder": _together(b"eins\nzwei\n", model="encoder"),
    "three files": _together(b"eins\nzwei\n", "a.fr"),
}.items():
    CASES.append(Case("lora init", _name, _run))


@case("Splits", "a file that is not there beside the one it belongs to")
def _(world: World) -> Printed:
    world.write("a.en.txt", "one\n")
    task = {"text_column": ..., "prompt_column": "en", "completion_column": "de"}
    return world.lora("validate", world.recipe("llama", data={"path": "a.{en,de}.txt"}, task=task))


@case("Language models", "instances without an output")
def _(world: World) -> Printed:
    rows = [None, [], "a", ["a"], [{"input": "a"}]]
    world.write("rows.jsonl", "".join(
        json.dumps({"instruction": "Add.", "instances": row}) + "\n" for row in rows))  # fmt: skip
    world.write("chat.jinja", TURNS)
    task = {"text_column": ..., "format": "self_instruct", "chat_template": "chat.jinja"}
    return world.lora("validate", world.recipe("llama", data={"path": "rows.jsonl"}, task=task))
