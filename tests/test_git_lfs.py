"""Errors for files that replace data: Git LFS pointers, web pages, saved data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import tiny
from drafting import Init, classification, labelled, lines, run_hint, said

from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.data.load_rows import load_rows
from lora_cli.data.pictures import picture_facts
from lora_cli.data.recordings import recording_facts
from lora_cli.errors import LoraError
from lora_cli.models.base_model import load_tokenizer
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import read_header

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
NAMES = ("csv", "tsv", "jsonl", "json", "parquet", "txt", "csv.gz", "parquet.gz", "conll")
ROWS = labelled(40, ["good", "bad"])
PAGE = "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


def recipe_of(path: Path, key: str = "path") -> Recipe:
    task = {"type": "sequence_classification"}
    return Recipe.model_validate(
        {"model": {"name": "base"}, "task": task, "data": {key: str(path)}}
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["encoder", "llama"])
def test_a_pointer_is_not_data(name: str, model: str, init: Init, tmp_path: Path) -> None:
    path = tmp_path / f"train.{name}"
    path.write_text(POINTER)
    for read in (lambda: init("", path, model), lambda: load_rows(recipe_of(path))):
        with pytest.raises(LoraError, match="this is a pointer of Git LFS") as caught:
            read()
        assert "git lfs pull" in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_among_the_files_of_a_base(name: str, tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    (base / name).unlink()
    (base / name).write_text(POINTER)
    recipe = Recipe.model_validate({
        "model": {"name": str(base)}, "task": {"type": "sequence_classification"},
        "data": {"path": "rows.csv"},
    })  # fmt: skip
    with pytest.raises(LoraError, match=f"{name} is a pointer of Git LFS"):
        load_tokenizer(recipe)


def test_a_pointer_for_weights_and_for_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(LoraError, match="it is a pointer of Git LFS"):
        read_header(tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text(POINTER)
    (tmp_path / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(LoraError, match="this is a pointer of Git LFS"):
        read_adapter(tmp_path)


def test_a_pointer_for_an_image_and_for_a_recording(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text(POINTER)
    value = {"path": str(tmp_path / "a.png"), "bytes": None}
    assert "is a pointer of Git LFS" in str(picture_facts(value).error)
    assert "is a pointer of Git LFS" in str(recording_facts(value).error)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.csv", PAGE, "a web page"), ("rows.jsonl", PAGE.lower(), "a web page"),
        ("rows.parquet", PAGE, "a web page"), ("rows.json", f"\ufeff {PAGE}", "a web page"),
        ("rows.xml", '<?xml version="1.0"?>\n<a><b>x</b></a>\n', "XML"),
        ("rows.csv", '<?xml version="1.0"?>\n<a><b>x</b></a>\n', "XML"),
        ("rows.arrow", b"\xff\xff\xff\xff\xa0\0\0\0" + bytes(90), "an Arrow file"),
    ],
)  # fmt: skip
def test_other_files_in_place_of_data(
    name: str, content: str | bytes, what: str, init: Init
) -> None:
    with pytest.raises(LoraError, match=f"this is {what}"):
        init(name, content, "llama")


def test_texts_may_be_markup(init: Init) -> None:
    pages = PAGE + "".join(f"<p>{text}</p>\n" for text, _ in ROWS)
    assert said(init("pages.txt", pages, "llama"))["text_column"] == "text"


def test_texts_in_columns_may_be_markup(init: Init) -> None:
    rows = [{"text": f"{PAGE}{text}", "label": label} for text, label in ROWS]
    assert said(init("pages.jsonl", lines(rows)))["labels"] == ["bad", "good"]


@pytest.mark.parametrize("has_splits", [False, True])
def test_a_data_set_saved_to_disk(has_splits: bool, init: Init, tmp_path: Path) -> None:
    frame = pandas.DataFrame(ROWS, columns=["text", "label"])
    saved: Any = datasets.Dataset.from_pandas(frame)
    if has_splits:
        saved = datasets.DatasetDict({"train": saved, "test": saved})
    saved.save_to_disk(str(tmp_path / "saved"))
    for read in (
        lambda: init("", tmp_path / "saved"),
        lambda: load_rows(recipe_of(tmp_path / "saved")),
        lambda: load_rows(recipe_of(tmp_path / "saved", "name")),
    ):
        with pytest.raises(LoraError, match="as `save_to_disk` of the library") as caught:
            read()
    run_hint(caught.value, tmp_path)
    written = tmp_path / ("train.parquet" if has_splits else "rows.parquet")
    assert pandas.read_parquet(written).equals(frame)
    assert said(init("", written)) == classification("text", "label", ["bad", "good"])
