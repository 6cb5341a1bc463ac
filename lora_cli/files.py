"""Folders and files that appear whole or not at all.

A folder is written under a temporary name beside its place, every file flushed to the disk, the
manifest (size and SHA-256 of each file) last, and then renamed: a reader sees all of it or nothing,
whenever the machine stops.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import IntegrityError, LoraError, Problem, ResourceError

MANIFEST = "manifest.json"
LOCK = ".lock"


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


def is_leftover(path: Path) -> bool:
    """Return whether a file or folder is only what a process leaves that was killed."""
    return path.name.startswith(".") and (path.name == LOCK or path.suffix in (".tmp", ".old"))


class FolderLock:
    """Keeps other processes from writing into a folder, until it is released or its process ends.

    It is the system's record lock on the file `.lock`, not the file itself: a process that was
    killed leaves no lock behind, and the processes that it had forked do not hold it.

    Args:
        folder: The folder, which must exist.
        at: Where it is named, for errors.

    Raises:
        LoraError: If another process has it, with the number of that process.
    """

    def __init__(self, folder: Path, at: str | None = None) -> None:
        self.path = folder / LOCK
        while True:
            self.file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError | PermissionError):
                    raise self._taken(folder, at) from error
                raise
            if self._is_still_there():
                break
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def _is_still_there(self) -> bool:
        """Return whether the file was not removed, by who had it, before it was locked here."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _taken(self, folder: Path, at: str | None) -> LoraError:
        self.file.seek(0)
        owner = self.file.read().strip() or "another process"
        self.file.close()
        what = f"{owner} is writing to {folder}"
        return LoraError(what, at, "wait for it, or choose another folder with `-o DIR`")

    def release(self) -> None:
        """Let others have the folder."""
        self.path.unlink(missing_ok=True)
        self.file.close()


def require_space(folder: Path, needed_bytes: int, at: str | None = None) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        ResourceError: If less is free on the disk of the folder.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"the disk of {folder} has {free / 2**20:,.1f} MiB free, and the run needs "
            f"{needed_bytes / 2**20:,.1f} MiB",
            at,
            "make room, choose another disk with `-o DIR`, or keep less with "
            "`--set checkpoint.keep=1`",
        )


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
