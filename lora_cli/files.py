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

from lora_cli.errors import IntegrityError

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that its name shows the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
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
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_files(temporary)
        write_manifest(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)
    _sync_folder(target.parent)


def publish(source: Path, target: Path) -> None:
    """Move the files of a folder into an existing one, each atomically, the manifest last."""
    write_manifest(source)
    for file in sorted(source.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
        umask_mode(file)
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
        if file.is_file() and file.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files})


def verify_manifest(folder: Path) -> bool:
    """Check the files of a folder against its manifest.

    Returns:
        Whether there is a manifest: False for a folder that another tool made.

    Raises:
        IntegrityError: If a listed file is missing or differs.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return False
    try:
        files = json.loads(manifest.read_text())["files"]
        entries = [(str(name), int(e["bytes"]), str(e["sha256"])) for name, e in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError("the manifest cannot be read", str(manifest)) from error
    for name, size, sha256 in entries:
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise IntegrityError(
                f"the manifest names a file outside its folder: `{name}`", str(manifest)
            )
        if not file.is_file():
            raise IntegrityError(f"`{name}` is missing", str(folder))
        if file.stat().st_size != size or sha256_of(file) != sha256:
            raise IntegrityError(
                f"`{name}` is not the file that was written",
                str(file),
                "it was damaged or edited; take it from a backup or train again",
            )
    return True


def umask_mode(file: Path) -> None:
    """Give a file the mode that the umask asks for (safetensors makes its files 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def _sync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            umask_mode(file)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
