"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli import files
from lora_cli.errors import IntegrityError
from lora_cli.files import (
    MANIFEST,
    new_folder,
    publish,
    sha256_of,
    verify_manifest,
    write_atomically,
    write_json,
    write_manifest,
)

pytestmark = pytest.mark.usefixtures("real_fsync")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    with new_folder(folder) as temporary:
        (temporary / "a.bin").write_bytes(bytes(range(256)))
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b.txt").write_text("β")
        (temporary / "inner" / MANIFEST).write_text("{}")  # of another folder, so a plain file
    return folder


# ------------------------------------------------------------------------------------- writing


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    write_atomically(file, "ä")
    write_atomically(file, b"second")
    write_json(tmp_path / "x.json", {"ö": [1]})
    assert file.read_bytes() == b"second"
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "ö": [\n    1\n  ]\n}\n'
    assert names(tmp_path) == ["x.json", "x.txt"]


@pytest.mark.parametrize("step", ["fsync", "write"])
def test_a_failed_write_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.txt"
    write_atomically(file, "old")
    content: Any = "new"
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", failing(OSError(28, "no space")))
    else:
        content = "\ud800"  # cannot be encoded
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_atomically(file, content)
    assert names(tmp_path) == ["x.txt"]
    assert file.read_text() == "old"


def test_a_new_folder_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "out"
    with new_folder(target) as temporary:
        (temporary / "a").write_text("a")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert names(target) == ["a", MANIFEST]
    assert names(target.parent) == ["out", "out/a", f"out/{MANIFEST}"]
    assert verify_manifest(target)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(130)])
def test_an_error_leaves_everything_as_it_was(
    error: BaseException, exists: bool, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "old").write_text("old")
    before = names(tmp_path)

    def write() -> None:
        with new_folder(target) as temporary:
            (temporary / "a").write_text("a")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == before


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("first", "second"):
        with new_folder(target) as temporary:
            (temporary / name).write_text(name)
    assert names(tmp_path) == ["out", f"out/{MANIFEST}", "out/second"]


def test_the_old_folder_comes_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def reject(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("refused")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", reject)
    with pytest.raises(OSError, match="refused"), new_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/old"]


def test_everything_is_on_the_disk_before_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", note)
    rename = Path.rename
    left: list[str] = []

    def check(self: Path, to: Path) -> Path:
        left.extend(str(p) for p in [self, *self.rglob("*")] if p.stat().st_ino not in synced)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", check)
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("a")
    assert left == []
    assert tmp_path.stat().st_ino in synced


def test_publishing_moves_files_and_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "staging", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    (target / "kept").write_text("kept")
    (target / "z").write_text("old")
    for name in ("a", "z"):
        (source / name).write_text(name)
        (source / name).chmod(0o600)
    order: list[str] = []
    replace = Path.replace

    def note(self: Path, to: Path) -> Path:
        if to.parent == target:
            order.append(to.name)
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", note)
    publish(source, target)
    assert order == ["a", "z", MANIFEST]
    assert names(tmp_path) == ["out", "out/a", "out/kept", f"out/{MANIFEST}", "out/z"]
    assert (target / "z").read_text() == "z"
    assert verify_manifest(target)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as temporary:
            (temporary / "inner").mkdir()
            for file in (temporary / "a", temporary / "inner" / "b"):
                file.write_text("x")
                file.chmod(0o600)
        (tmp_path / "staging").mkdir()
        (tmp_path / "staging" / "c").write_text("x")
        (tmp_path / "staging" / "c").chmod(0o600)
        publish(tmp_path / "staging", tmp_path / "out")
        write_atomically(tmp_path / "out" / "d", "x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    found = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == dict.fromkeys(("a", "b", "c", "d", MANIFEST), mode)


# ---------------------------------------------------------------------------------- the manifest


def test_a_manifest_holds_size_and_hash_of_every_file(whole: Path) -> None:
    listed = json.loads((whole / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["a.bin", "inner/b.txt", f"inner/{MANIFEST}"]
    assert listed["a.bin"] == {
        "bytes": 256,
        "sha256": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880",
    }
    assert sha256_of(whole / "a.bin") == listed["a.bin"]["sha256"]
    (whole / "new").write_text("files that came later are not its business")
    assert verify_manifest(whole)
    write_manifest(whole)
    assert "new" in json.loads((whole / MANIFEST).read_text())["files"]


def test_a_folder_without_manifest_is_unverified(tmp_path: Path) -> None:
    assert verify_manifest(tmp_path) is False


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit": lambda f: flip(f / "a.bin"),
    "a bit inside": lambda f: flip(f / "inner" / "b.txt"),
    "a nested manifest": lambda f: (f / "inner" / MANIFEST).write_text("{ }"),
    "cut": lambda f: os.truncate(f / "a.bin", 255),
    "longer": lambda f: (f / "a.bin").write_bytes(bytes(range(256)) + b"x"),
    "emptied": lambda f: os.truncate(f / "a.bin", 0),
    "missing": lambda f: (f / "a.bin").unlink(),
    "missing folder": lambda f: shutil.rmtree(f / "inner"),
    "a folder instead": lambda f: ((f / "a.bin").unlink(), (f / "a.bin").mkdir()),
    "a dangling link": lambda f: ((f / "a.bin").unlink(), (f / "a.bin").symlink_to("nowhere")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_is_found(kind: str, whole: Path) -> None:
    DAMAGE[kind](whole)
    with pytest.raises(IntegrityError) as caught:
        verify_manifest(whole)
    assert caught.value.exit_code == 4
    assert all(problem.at and problem.hint for problem in caught.value.problems)


def test_all_damage_is_named_at_once(whole: Path) -> None:
    flip(whole / "a.bin")
    (whole / "inner" / "b.txt").unlink()
    with pytest.raises(IntegrityError) as caught:
        verify_manifest(whole)
    assert [p.what for p in caught.value.problems] == [
        "`a.bin` is not the file that was written",
        "`inner/b.txt` is missing",
    ]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {"bytes": 1}}}',
     '{"files": {"a": {"bytes": "x", "sha256": ""}}}', "[" * 100_000, "\xff", "null",
     '{"files": null}'],
)  # fmt: skip
def test_a_broken_manifest_is_an_integrity_error(text: str, whole: Path) -> None:
    (whole / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match="cannot be read"):
        verify_manifest(whole)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "inner/../../x", "a\0b"])
def test_a_manifest_cannot_point_outside_its_folder(name: str, whole: Path) -> None:
    (whole.parent / "x").write_text("x")
    entry = {"bytes": 1, "sha256": sha256_of(whole.parent / "x")}
    (whole / MANIFEST).write_text(json.dumps({"files": {name: entry}}))
    with pytest.raises(IntegrityError, match="outside its folder"):
        verify_manifest(whole)
