"""Folders and files that appear whole or not at all.

A folder is written under a temporary name beside its place, every file flushed to the disk, the
manifest (size and SHA-256 of each file) last, and then renamed: a reader sees all of it or nothing,
whenever the machine stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import IntegrityError, Problem

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that its name shows the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target`, with a manifest, when the block ends well.

    An existing `target` is replaced. After an error nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
        _sync_tree(temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Move the files of a folder into an existing one, each atomically, the manifest last."""
    write_manifest(source)
    _sync_tree(source)
    for file in sorted(source.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
        file.replace(target / file.name)
    _sync_folder(target)
    source.rmdir()


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file of the folder."""
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files})


def verify_manifest(folder: Path) -> bool:
    """Check the files of a folder against its manifest.

    Returns:
        Whether there is a manifest: False for a folder that another tool made.

    Raises:
        IntegrityError: With every listed file that is missing or differs.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return False
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        entries = [(str(name), int(e["bytes"]), str(e["sha256"])) for name, e in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            "the manifest cannot be read", str(manifest), "take it from a backup or train again"
        ) from error
    problems = []
    for name, size, sha256 in entries:
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            what = f"the manifest names a file outside its folder: {name!r}"
            problems.append(Problem(what, str(manifest)))
        elif not file.is_file():
            hint = "take it from a backup or train again"
            problems.append(Problem(f"`{name}` is missing", str(folder), hint))
        elif file.stat().st_size != size or sha256_of(file) != sha256:
            what = f"`{name}` is not the file that was written"
            hint = "it was damaged or edited; take it from a backup or train again"
            problems.append(Problem(what, str(file), hint))
    if problems:
        raise IntegrityError(problems)
    return True


def umask_mode(file: Path) -> None:
    """Give a file the mode that the umask asks for (safetensors makes its files 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder to the disk, files with the mode of the umask."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        else:
            umask_mode(path)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
