"""Folders and files that appear completely or not at all.

A folder is written under a temporary name beside its place, every file flushed to the disk, the
manifest (size and SHA-256 of each file) last, and then renamed: a reader sees all of it or nothing,
whenever the machine stops. Files that are to lie in a folder that has others (`publish`) are made
whole beside them first; from then on they count, and whoever comes next moves those that a killed
process had not moved yet.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import select
import shlex
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import IntegrityError, LoraError, Problem, ResourceError
from lora_cli.folder_lock import LOCK, FolderLock
from lora_cli.format_version import FORMAT, require_format
from lora_cli.redaction import redacted

MANIFEST = "manifest.json"
STAGING = ".publish.tmp"  # what is to be published, not whole yet
READY = ".publish.ready"  # it is whole, and not all of it has been moved
PATIENCE_S = 10.0  # for another process that is moving files, or writes into a pipe
MOST_JSON_BYTES = 2**24  # of a manifest or another small file; the largest of ours has kilobytes
LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")  # of a name, by a process


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bounded(path: Path, limit_bytes: int = MOST_JSON_BYTES) -> bytes:
    """Return the content of a file that others wrote, up to a limit.

    A pipe (`<(command)`) is read too; who waits for one that nobody writes into waits in vain.

    Raises:
        OSError: If it cannot be read, is too large (`EFBIG`), or nothing comes (`ETIMEDOUT`).
    """
    # without O_NONBLOCK, opening a pipe that nobody writes into never returns
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        mode = os.fstat(descriptor).st_mode
        parts: list[bytes] = []
        size = 0
        while size <= limit_bytes:
            if not stat.S_ISREG(mode) and not select.select([file], [], [], PATIENCE_S)[0]:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(path))
            part = file.read(min(2**20, limit_bytes + 1 - size))
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that its name always shows the old or the new content, never a part.

    Secrets in a text are masked.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(redacted(content).encode() if isinstance(content, str) else content)
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
    delete_of_dead(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary)
        sync_tree(temporary)
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
    """Move the files of a folder into an existing one on the same disk: all of them, or none.

    If the process ends while they are moved, `finish_publishing` moves the rest.
    """
    write_manifest(source)
    sync_tree(source)
    _move_ready(target)  # of an earlier process
    source.rename(target / READY)
    _sync_folder(target)
    _move_ready(target)


def _move_ready(target: Path) -> None:
    ready = target / READY
    if not ready.is_dir():
        return
    for file in sorted(ready.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
        if (target / file.name).is_dir():  # a folder takes the place of an empty one only
            _delete(target / file.name)
        file.replace(target / file.name)
    _sync_folder(target)
    ready.rmdir()


def finish_publishing(folder: Path) -> None:
    """Finish what a process began that ended while it published into a folder.

    Raises:
        IntegrityError: If the folder cannot be written to.
        LoraError: If a process has been at it for too long.
    """
    patience = time.monotonic() + PATIENCE_S
    while (folder / READY).is_dir():
        try:
            lock = FolderLock(folder)
        except LoraError:  # it is at work, and will be done in a moment
            if time.monotonic() > patience:
                raise
            time.sleep(0.05)
            continue
        except OSError as error:
            what = f"its files were being replaced when a run ended: {error.strerror}"
            hint = "let the folder be written to once, or copy it to where it can be"
            raise IntegrityError(what, str(folder), hint) from error
        try:
            _move_ready(folder)
        finally:
            lock.release()


def recover(folder: Path) -> None:
    """Repair what killed processes left in a folder while writing into it.

    What was being replaced and has no successor comes back; what was not whole is deleted. No other
    process may be writing there.
    """
    _move_ready(folder)
    for path in list(folder.glob(".*")):
        found = LEFTOVER.fullmatch(path.name)
        if found is not None and found[3] == "old" and not (folder / found[1]).exists():
            path.rename(folder / found[1])
        elif is_leftover(path) and path.name != LOCK:
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def delete_of_dead(target: Path) -> None:
    """Delete the temporary files of processes that were killed while writing a folder or file."""
    for path in list(target.parent.glob(".*.tmp")):
        found = LEFTOVER.fullmatch(path.name)
        if found is not None and found[1] == target.name and not is_alive(int(found[2])):
            _delete(path)


def is_alive(process: int) -> bool:
    """Return whether a process with this ID runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


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
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def verify_manifest(folder: Path, *required: str) -> bool:
    """Check the files of a folder against its manifest.

    Args:
        folder: The folder.
        required: Files that the manifest has to vouch for.

    Returns:
        Whether there is a manifest: False for a folder that another tool made.

    Raises:
        IntegrityError: With every listed file that is missing or differs.
        LoraError: If a newer version wrote the manifest.
        ResourceError: If the system does not let files be read.
    """
    try:
        return _verify(folder, *required)
    except PermissionError as error:
        raise forbidden(Path(error.filename or folder)) from error


def forbidden(path: Path) -> ResourceError:
    """Return the error for a file or folder without read permission, which may be intact."""
    closed = (up for up in reversed(path.parents) if not os.access(up, os.X_OK, effective_ids=True))
    path = next(closed, path)
    hint = f"let it be read: `chmod -R u+rwX {shlex.quote(str(path))}`, as its owner"
    return ResourceError("it may not be read: permission denied", str(path), hint)


def _verify(folder: Path, *required: str) -> bool:
    manifest = folder / MANIFEST
    if not manifest.exists():
        return False
    try:
        raw = read_bounded(manifest)
        values = json.loads(raw)
        require_format(values, str(manifest))
        files = values["files"]
        entries = [(str(name), int(e["bytes"]), str(e["sha256"])) for name, e in files.items()]
    except PermissionError:
        raise
    except (
        *(OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError),
        RecursionError,
    ) as error:
        raise IntegrityError(
            "the manifest cannot be read", str(manifest), "restore it from a backup or train again"
        ) from error
    problems = [reason for entry in entries if (reason := _error_of(folder, *entry)) is not None]
    for name in required:
        if name not in files:
            what, hint = f"the manifest does not list `{name}`", "restore both from a backup"
            problems.append(Problem(what, str(manifest), hint))
    if not problems:
        return True
    if (folder / READY).is_dir() or (manifest.is_file() and read_bounded(manifest) != raw):
        finish_publishing(folder)  # a run that goes on has published meanwhile
        return _verify(folder, *required)
    raise IntegrityError(problems)


def _error_of(folder: Path, name: str, size: int, sha256: str) -> Problem | None:
    """Return what is wrong with a file that is listed in a manifest."""
    file = folder / name
    hint = "restore it from a backup or train again"
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        what = f"the manifest names a file outside its folder: {name!r}"
        return Problem(what, str(folder / MANIFEST), "do not use this folder: ask who made it")
    if not file.is_file():
        return Problem(f"`{name}` is missing", str(folder), hint)
    if file.stat().st_size != size or sha256_of(file) != sha256:
        what = f"`{name}` is not the file that was written"
        return Problem(what, str(file), f"it was damaged or edited; {hint}")
    return None


def reject_links_outside(folder: Path) -> None:
    """Reject a folder with a file that is a link to somewhere else, or has no end.

    The Hub's cache is not elsewhere: every file of a snapshot in it is a link to another folder of
    it, and older downloads to a folder are links to it too.

    Raises:
        IntegrityError: With every such file.
    """
    root = folder.resolve()
    inside = sorted(folder.rglob("*"))
    problems = [
        Problem(
            f"`{path.name}` is a link to {path.readlink()}, which is outside the folder",
            str(folder),
            "put the file itself in its place, if you trust it",
        )
        for path in inside
        if path.is_symlink() and not _is_within(path.resolve(), root)
    ]
    problems += [problem for path in inside if (problem := _endless(path)) is not None]
    if problems:
        raise IntegrityError(problems)


def _endless(path: Path) -> Problem | None:
    """Return a problem if reading a file would never end, or fill the memory."""
    try:
        status = path.stat()
    except OSError:  # a link to nothing, which is missing
        return None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        what = f"`{path.name}` is a pipe, a device or a socket, and not a file"
        return Problem(what, str(path.parent), "put the file itself in its place")
    if path.name.endswith("config.json") and status.st_size > MOST_JSON_BYTES:
        what = f"`{path.name}` has {status.st_size:,} bytes, and such files have a few thousand"
        return Problem(what, str(path.parent), "do not use this folder: ask who made it")
    return None


def _is_within(target: Path, root: Path) -> bool:
    blobs, repository = target.parent.name, target.parent.parent.name
    in_cache = blobs == "blobs" and repository.startswith("models--")
    return in_cache or target.is_relative_to(root)


def is_leftover(path: Path) -> bool:
    """Return whether a file or folder was left over by a killed process."""
    return path.name.startswith(".") and (path.name == LOCK or path.suffix in (".tmp", ".old"))


def require_space(folder: Path, needed_bytes: int, at: str | None = None) -> None:
    """Check that the disk has enough space for the next files.

    Raises:
        ResourceError: If less is free on the disk of the folder.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"the disk of {folder} has {free / 2**20:,.1f} MiB free, and the run needs "
            f"{needed_bytes / 2**20:,.1f} MiB",
            at,
            "free some space, choose another disk with `-o DIR`, or keep less with "
            "`--set checkpoint.keep=1`",
        )


def umask_mode(file: Path) -> None:
    """Set the mode of a file according to the umask (safetensors creates files with 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder to disk, and set the mode of files according to the umask."""
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
