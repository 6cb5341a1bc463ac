from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from lora_cli.data import dataset_cache, file_rows, load_rows
from lora_cli.data.dataset_cache import cached_dataset
from lora_cli.errors import LoraError, ResourceError
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task

FEATURES = datasets.Features({"n": datasets.Value("int64"), "text": datasets.Value("string")})
ROWS = [{"n": i, "text": f"row {i}"} for i in range(2500)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "lora"


def make(rows: list[dict[str, Any]] | None = None, key: str = "key") -> list[dict[str, Any]]:
    return list(cached_dataset(lambda: ROWS if rows is None else rows, [key], FEATURES))


def only(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def no_rows() -> Iterator[dict[str, Any]]:
    raise AssertionError("the rows were made again")


def test_rows_are_built_once(root: Path) -> None:
    assert make() == ROWS
    assert list(cached_dataset(no_rows, ["key"], FEATURES)) == ROWS
    assert make(ROWS[:3], "another key") == ROWS[:3]
    assert len(list(root.iterdir())) == 2
    assert make([], "no rows") == []


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit": flip,
    "a cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "emptied": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "removed": Path.unlink,
    "a link": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", ["rows.arrow", "key.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.slow_after(3)
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    name: str, damage: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    folder = only(root)
    DAMAGE[damage](folder / name)
    assert make() == ROWS
    said = capsys.readouterr().err
    assert said.count("warning: cached rows are damaged and were rebuilt") == 1
    assert str(folder) in said
    assert list(cached_dataset(no_rows, ["key"], FEATURES)) == ROWS
    assert only(root) == folder  # and no other files are left


def test_a_renamed_folder_is_detected(root: Path) -> None:
    make()
    folder = only(root)
    make(ROWS[:3], "another key")
    (other,) = (path for path in root.iterdir() if path != folder)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    assert make() == ROWS
    shutil.rmtree(folder)
    folder.write_text("a file in the place of the folder")
    assert make() == ROWS


def test_the_first_of_two_processes_wins(root: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        make()  # the other process is faster
        yield from ROWS

    assert list(cached_dataset(rows, ["key"], FEATURES)) == ROWS
    only(root)


def test_no_files_are_left_after_an_error_or_by_a_dead_process(root: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise OSError(errno.EIO, "the source's own error", "rows.csv")

    with pytest.raises(OSError, match="the source's own error"):
        cached_dataset(rows, ["key"], FEATURES)
    assert not list(root.iterdir())
    dead = os.fork()
    if dead == 0:
        try:
            cached_dataset(lambda: os._exit(9), ["x"], datasets.Features({}))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(dead, 0)[1]) == 9
    host = dataset_cache.socket.gethostname()
    left = root / f".{'0' * 32}.{host}.{dead}.ab.tmp"
    alive = root / f".{'0' * 32}.{host}.{os.getpid()}.ab.tmp"
    elsewhere = root / f".{'0' * 32}.another-host.{dead}.ab.tmp"
    for folder in (left, alive, elsewhere):
        folder.mkdir(parents=True)
    make()
    assert not left.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_a_cache_that_cannot_be_written_to_is_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/cache")
    with pytest.raises(ResourceError, match="cache of data sets cannot be written to: not a dir"):
        make()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root.parent)

    def full(*_: Any) -> None:
        raise OSError("[Errno 28] Error writing bytes to file")  # the message of pyarrow

    monkeypatch.setattr(dataset_cache, "write_manifest", full)
    with pytest.raises(ResourceError, match="no space left on device") as result:
        make()
    assert "HF_DATASETS_CACHE=DIR" in str(result.value)
    assert not list(root.iterdir())


# ----------------------------------------------------------------- a file and its encoded examples


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path)


def encoded(recipe_file: Path) -> list[dict[str, Any]]:
    task = build_task(load_recipe(recipe_file))
    task.load_processor()
    return list(load_data(task)["train"].examples)


def test_every_file_in_the_cache_of_a_run_is_checked(
    recipe_file: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = encoded(recipe_file)
    files = [file for folder in root.iterdir() for file in folder.iterdir()]
    assert len(files) == 6  # the caches of rows and of examples
    for file in files:
        flip(file)
    assert encoded(recipe_file) == expected
    assert capsys.readouterr().err.count("cached rows are damaged") == 2


Replace = Callable[[Path, str], Any]


def rename(file: Path, text: str) -> None:
    file.with_name("new").write_text(text)
    file.with_name("new").replace(file)


@pytest.mark.parametrize("replace", [Path.write_text, rename])
@pytest.mark.parametrize("back", [False, True])
def test_a_file_that_is_replaced_while_it_is_read(
    replace: Replace, back: bool, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final content of the file is used, and no cache gets rows of another content."""
    file = recipe_file.with_name("rows.jsonl")
    old = file.read_text()
    new = old.replace("film", "book")
    read, times = file_rows.read_rows, []

    def replacing(path: Path, form: Any) -> Iterator[Any]:
        if not times:
            replace(file, new)  # after the file was hashed
        yield from read(path, form)
        if not times and back:
            replace(file, old)
        times.append(1)

    monkeypatch.setattr(file_rows, "read_rows", replacing)
    monkeypatch.setattr(file_rows, "warn", lambda _: None)

    def texts() -> list[str]:
        return [row["text"] for row in load_rows.load_rows(load_recipe(recipe_file))["train"]]

    assert texts() == [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(times) == 2
    for text in (old, new):
        file.write_text(text)
        assert texts() == [json.loads(line)["text"] for line in text.splitlines()]


def test_a_file_that_never_stops_changing(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = recipe_file.with_name("rows.jsonl"), file_rows.read_rows

    def growing(path: Path, form: Any) -> Iterator[Any]:
        yield from read(path, form)
        file.write_text(file.read_text() + '{"text": "more", "label": 1}\n')

    monkeypatch.setattr(file_rows, "read_rows", growing)
    with pytest.raises(LoraError, match="the file changes while it is read"):
        load_rows.load_rows(load_recipe(recipe_file))
