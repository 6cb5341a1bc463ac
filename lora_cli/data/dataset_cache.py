"""Cache data sets on disk: build each once, and verify it before every use.

Each data set has its own folder, named by a hash of everything its rows depend on, with a manifest
of sizes and SHA-256 sums. The folder is moved into place when complete, so no locks are needed: if
two processes build the same data set, the first to finish wins. A damaged data set is rebuilt, with
a warning.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_cli import __version__
from lora_cli.environment import installed_version
from lora_cli.errors import IntegrityError, LoraError, ResourceError, counted, warn
from lora_cli.files import (
    MANIFEST,
    is_alive,
    read_bounded,
    sha256_of,
    sync_tree,
    verify_manifest,
    write_json,
    write_manifest,
)
from lora_cli.format_version import FORMAT, require_format

TABLE = "rows.arrow"
KEY = "key.json"  # the full hash of what the rows depend on, which exposes a renamed folder
LIBRARIES = (
    "datasets",
    "pyarrow",
    "tokenizers",
    "transformers",
)  # whose versions affect how rows are written or read
BATCH_ROWS = 1000
BATCH_BYTES = 2**25  # of text and media buffered before a write
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PROGRESS_DELAY_S = 2.0  # seconds before progress is shown
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(.+)\.(\d+)\.[0-9a-f]+\.tmp")


class _ReadError(Exception):
    """The source of the rows could not be read, which is not an error of the cache."""


class SourceChangedError(Exception):
    """The source of the rows changed while they were read, so they are not cached."""


def cached_dataset(
    generator: Callable[[], Iterable[dict[str, Any]]],
    key: Sequence[str],
    features: Any,
    changed: Callable[[], bool] = lambda: False,
) -> Any:
    """Return a data set from the cache, building it first if necessary.

    Args:
        generator: Function that yields the rows.
        key: Everything that the rows depend on; its hash names the folder in the cache.
        features: The `datasets.Features` of the columns.
        changed: Returns whether the source of the rows has changed; called after the last row.

    Raises:
        SourceChangedError: If the source has changed; nothing is cached.
        ResourceError: If the cache cannot be written to.
        IntegrityError: If the rows just written cannot be read back.
    """
    import datasets

    versions = [f"{name} {installed_version(name)}" for name in LIBRARIES]
    depends_on = json.dumps([__version__, versions, *key, str(features)])
    sha256 = hashlib.sha256(depends_on.encode()).hexdigest()
    stamp, digest = {"format": FORMAT, "lora": __version__, "sha256": sha256}, sha256[:32]
    root = Path(datasets.config.HF_DATASETS_CACHE) / "lora"
    if (cached := _open(root / digest, stamp)) is not None:
        return cached
    try:
        temporary = _write(root, digest, stamp, generator(), features, changed)
        _publish(temporary, root / digest, stamp)
    except _ReadError as error:
        raise (error.__cause__ or error) from None
    except OSError as error:
        raise _cannot_write(root, error) from error
    cached = _open(root / digest, stamp)
    if cached is None:
        what = "a data set that was just written to the cache reads back otherwise"
        hint = "is the disk damaged? Name another: `HF_DATASETS_CACHE=DIR lora …`"
        raise IntegrityError(what, str(root / digest), hint)
    return cached


def _open(folder: Path, stamp: dict[str, Any], warn_user: Callable[[str], None] = warn) -> Any:
    """Return the data set in a folder; None if it is missing, or damaged (with a warning)."""
    import datasets

    if not os.path.lexists(folder):
        return None
    try:
        if not verify_manifest(folder, TABLE, KEY):
            raise IntegrityError(f"`{MANIFEST}` is missing", str(folder))
        saved_stamp = json.loads(read_bounded(folder / KEY))
        require_format(saved_stamp, str(folder / KEY))
        if {"format": FORMAT, **saved_stamp} != stamp:
            raise IntegrityError("it holds the rows of something else", str(folder))
        return datasets.Dataset.from_file(str(folder / TABLE))
    except LoraError as error:
        reason = error.problems[0].what
    except Exception as error:  # pyarrow and the system raise errors of many types
        reason = str(error) or type(error).__name__
    warn_user(f"cached rows are damaged and were rebuilt: {reason}, in {folder}")
    return None


def _write(
    root: Path,
    digest: str,
    stamp: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    features: Any,
    changed: Callable[[], bool],
) -> Path:
    """Write the rows and their manifest into a temporary folder, and return it."""
    from datasets.arrow_writer import ArrowWriter

    root.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(root)
    host, process = socket.gethostname(), os.getpid()
    temporary = root / f".{digest}.{host}.{process}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        writer = ArrowWriter(
            features=features, path=str(temporary / TABLE), writer_batch_size=BATCH_ROWS
        )
        with writer:
            waiting = 0
            for row in _with_progress(rows):
                writer.write(row)
                waiting += sum(map(_size_of, row.values()))
                if waiting > BATCH_BYTES:
                    writer.write_examples_on_file()
                    waiting = 0
            writer.finalize()
        if changed():
            raise SourceChangedError
        write_json(temporary / KEY, stamp)
        write_manifest(temporary)
        sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def _size_of(value: Any) -> int:
    """Return the approximate size of text and media in bytes; 0 for numbers."""
    if isinstance(value, dict):
        return sum(map(_size_of, value.values()))
    return len(value) if isinstance(value, str | bytes) else 0


def _publish(temporary: Path, folder: Path, stamp: dict[str, Any]) -> None:
    """Rename a temporary folder to its final name, unless another process did so first."""
    aside = temporary.with_name(f"{temporary.stem}-old.tmp")
    try:
        if os.path.lexists(folder) and _open(folder, stamp, lambda _: None) is None:
            folder.rename(aside)  # it is damaged; processes that have it open can still read it
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
    finally:
        for path in (temporary, aside):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _delete_leftovers(root: Path) -> None:
    """Delete temporary folders left by processes of this machine that no longer run."""
    for path in root.glob(".*.tmp"):
        match = LEFTOVER.fullmatch(path.name)
        if match is not None and match[1] == socket.gethostname() and not is_alive(int(match[2])):
            shutil.rmtree(path, ignore_errors=True)


def _with_progress(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows, and show their number on a terminal if it takes long."""
    last_shown = began = time.monotonic()
    iterator = iter(rows)
    for number in itertools.count(1):
        try:
            yield next(iterator)
        except StopIteration:
            break
        except OSError as error:
            raise _ReadError from error
        if number % 1000 == 0 and sys.stderr.isatty():
            now = time.monotonic()
            if now - began > PROGRESS_DELAY_S and now - last_shown > 0.2:
                sys.stderr.write(f"\r{counted(number, 'row')}")
                sys.stderr.flush()
                last_shown = now
    if last_shown != began:
        sys.stderr.write("\r" + " " * 30 + "\r")


def _cannot_write(root: Path, error: OSError) -> ResourceError:
    match = re.search(r"\[errno (\d+)\]", str(error), re.IGNORECASE)
    number = error.errno or (int(match[1]) if match else None)
    reason = os.strerror(number) if number else str(error)
    what = f"the cache of data sets cannot be written to: {reason.lower()}"
    advice = "free some space there" if number in DISK_FULL else "allow it to be written to"
    hint = f"{advice}, or name another folder: `HF_DATASETS_CACHE=DIR lora …`"
    return ResourceError(what, str(root), hint)


# -------------------------------------------------------------------------------- Hub data sets


def damaged_files(dataset: Any) -> list[str]:
    """Return the cache files of a Hub data set that have changed since their first use.

    `datasets` keeps no checksums of the files that it prepares. So they are recorded at the first
    use, next to the data sets of this cache.
    """
    import datasets

    files = sorted(entry["filename"] for entry in dataset.cache_files)
    if not files:
        return []
    names = hashlib.sha256("\n".join(files).encode()).hexdigest()[:32]
    notes = Path(datasets.config.HF_DATASETS_CACHE) / "lora" / f"hub-{names}.json"
    sums = {file: sha256_of(Path(file)) for file in files}
    try:
        recorded = json.loads(read_bounded(notes))
    except (OSError, ValueError, RecursionError):
        recorded = None
    if isinstance(recorded, dict) and set(recorded) == set(files):
        return [file for file in files if recorded[file] != sums[file]]
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        write_json(notes, sums)
    except OSError as error:
        raise _cannot_write(notes.parent, error) from error
    return []


def forget_files(dataset: Any) -> None:
    """Forget the checksums of a Hub data set that has been prepared again."""
    import datasets

    files = sorted(entry["filename"] for entry in dataset.cache_files)
    names = hashlib.sha256("\n".join(files).encode()).hexdigest()[:32]
    notes = Path(datasets.config.HF_DATASETS_CACHE) / "lora" / f"hub-{names}.json"
    notes.unlink(missing_ok=True)
