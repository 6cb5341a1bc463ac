"""An error that nobody foresaw is three lines on the screen and a traceback in a file."""

from __future__ import annotations

import errno
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lora_cli.cli import app as cli
from lora_cli.errors import LoraError, name_neighbours, require_file
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.unexpected_errors import note_phase, own_words, phase, unexpected_error

SECRET = "https://me:pass-of-mine@host"


def printed(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    def fail(*_: Any) -> Any:
        with phase("reading the recipe"):
            raise error

    monkeypatch.setattr("lora_cli.cli.options.load", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["lora", "validate", "r.yaml"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    return int(exited.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ZeroDivisionError("division by zero"), RecursionError("too deep"),
     AssertionError(), TypeError(f"no answer from {SECRET}"), IndexError("a\nb")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_three_lines_and_a_file(
    error: Exception, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, said = printed(error, monkeypatch, capsys)
    first, second, third = said.splitlines()
    assert code == 1
    assert first.startswith("error: unexpected error while reading the recipe: ")
    assert type(error).__name__ in first
    assert second.startswith("  at ")
    (file,) = tmp_path.glob("lora-error-*.txt")
    assert third.startswith(f"hint: the traceback is in {file}")
    kept = file.read_text()
    assert kept.startswith("$ lora validate r.yaml\n")
    assert "Traceback (most recent call last):" in kept
    assert "pass-of-mine" not in kept + said
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


class RustError(Exception):
    """Stands for an error of a library that is written in Rust, as safetensors is."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RustError("I/O error: No space left on device (os error 28)"), 5, "the disk is full"),
        (RustError("I/O error: File too large (os error 27)"), 5, "grown larger than"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "m/x"), 5, "quota is used up\n  at m/x"),
        (FileExistsError(errno.EEXIST, "File exists", "/dev/full"), 5, "path cannot be used"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 5, "denies access"),
    ],
    ids=["disk", "size", "quota", "no folder", "access"],
)
def test_what_the_system_denies_is_said_whichever_library_asked(
    error: Exception,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended, text = printed(error, monkeypatch, capsys)
    assert ended == code
    assert words in text
    assert "--resume" not in text  # only training has it


def test_a_path_that_is_there_is_not_suggested(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert name_neighbours(tmp_path / "file") == f"{tmp_path / 'file'} is a file"
    assert name_neighbours(Path("/dev/null")) == "/dev/null is a pipe or a device"
    assert name_neighbours(tmp_path / "fil") == f"did you mean `{tmp_path / 'file'}`?"
    for path, words in (("/dev/null", "a pipe or a device"), (str(tmp_path), "a folder")):
        with pytest.raises(LoraError, match=f"{path} is {words}, and not a file"):
            require_file(Path(path), "--input")


def test_where_no_file_can_be_written_the_way_to_the_traceback_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    _, said = printed(KeyError("x"), monkeypatch, capsys)
    assert "`--debug`" in said.splitlines()[2]


def test_the_innermost_phase_is_kept() -> None:
    error = KeyError("x")
    note_phase(error, "training, in step 3")
    note_phase(error, "running")
    assert "while training, in step 3: KeyError: 'x'" in str(unexpected_error(error, ["train"]))


def test_the_words_of_a_data_loader_are_its_last_line() -> None:
    trace = "Original Traceback (most recent call last):\n  File x\nKeyError: 'text'\n"
    text = f"Caught KeyError in DataLoader worker process 0.\n{trace}"
    assert own_words(RuntimeError(text)) == "KeyError: 'text'"


def test_an_error_in_a_step_names_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe = tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path)
    monkeypatch.setattr("lora_cli.training.run.train_step", lambda *_: torch.zeros(2)[5])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["lora", "train", str(recipe)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "error: unexpected error while training, in step 1: IndexError" in said


def test_a_tokenizer_that_fails_on_a_row_names_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = SequenceClassification.encode

    def fail(self: Any, rows: Any) -> Any:
        if any("great" in row["text"] for row in rows):
            raise OverflowError("no such letter")
        return encode(self, rows)

    monkeypatch.setattr(SequenceClassification, "encode", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    recipe = tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path)
    monkeypatch.setattr("sys.argv", ["lora", "validate", str(recipe)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "error: the tokenizer cannot encode this row: OverflowError: no such letter" in said
    assert "rows.jsonl:3" in said
