"""Data sets that are made once and then read from the disk, and are checked before every use.

Each lies in a folder of its own, named by a hash of all that its rows depend on, with a manifest of
sizes and SHA-256 sums. The folder appears whole or not at all, so there are no locks: if two
processes make the same data set, the first to finish wins. What is damaged is rebuilt, and that
is said.
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
KEY = "key.json"  # the hash of what the rows depend on: a folder that was renamed is found out
LIBRARIES = ("datasets", "pyarrow", "tokenizers", "transformers")  # which make or read the rows
BATCH_ROWS = 1000
BATCH_BYTES = 2**25  # of text and media that wait to be written
FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_S = 2.0  # before progress is shown
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(.+)\.(\d+)\.[0-9a-f]+\.tmp")


class _ReadError(Exception):
    """The system could not read what the rows are made from, which is no error of the cache."""


class SourceChangedError(Exception):
    """What the rows were made from has changed meanwhile, so they are not kept."""


def cached_dataset(
    generator: Callable[[], Iterable[dict[str, Any]]],
    key: Sequence[str],
    features: Any,
    changed: Callable[[], bool] = lambda: False,
) -> Any:
    """Return a data set that is made once and then read from the disk.

    Args:
        generator: Function that yields the rows.
        key: What the rows depend on; the folder in the cache is named by its hash.
        features: Types of the columns.
        changed: Says, after the last row, whether what the rows were made from is another now.

    Raises:
        SourceChangedError: If it is; then nothing is kept.
        ResourceError: If the cache cannot be written to.
    """
    import datasets

    versions = [f"{name} {installed_version(name)}" for name in LIBRARIES]
    whole = json.dumps([__version__, versions, *key, str(features)])
    sha256 = hashlib.sha256(whole.encode()).hexdigest()
    about, digest = {"format": FORMAT, "lora": __version__, "sha256": sha256}, sha256[:32]
    root = Path(datasets.config.HF_DATASETS_CACHE) / "lora"
    if (found := _open(root / digest, about)) is not None:
        return found
    try:
        temporary = _make(root, digest, about, generator(), features, changed)
        _publish(temporary, root / digest, about)
    except _ReadError as error:
        raise (error.__cause__ or error) from None
    except OSError as error:
        raise _cannot_write(root, error) from error
    cached = _open(root / digest, about)
    if cached is None:
        what = "a data set that was just written to the cache reads back otherwise"
        hint = "is the disk damaged? Name another: `HF_DATASETS_CACHE=DIR lora …`"
        raise IntegrityError(what, str(root / digest), hint)
    return cached


def _open(folder: Path, about: dict[str, Any], say: Callable[[str], None] = warn) -> Any:
    """Return the data set in a folder; None if there is none, or it is damaged, which is said."""
    import datasets

    if not os.path.lexists(folder):
        return None
    try:
        if not verify_manifest(folder, TABLE, KEY):
            raise IntegrityError(f"`{MANIFEST}` is missing", str(folder))
        found = json.loads(read_bounded(folder / KEY))
        require_format(found, str(folder / KEY))
        if {"format": FORMAT, **found} != about:
            raise IntegrityError("it holds the rows of something else", str(folder))
        return datasets.Dataset.from_file(str(folder / TABLE))
    except LoraError as error:
        reason = error.problems[0].what
    except Exception as error:  # of pyarrow and the system, in any form they like
        reason = str(error) or type(error).__name__
    say(f"cached rows are damaged and were rebuilt: {reason}, in {folder}")
    return None


def _make(
    root: Path,
    digest: str,
    about: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    features: Any,
    changed: Callable[[], bool],
) -> Path:
    """Write the rows into a temporary folder, with a manifest, and return it."""
    from datasets.arrow_writer import ArrowWriter

    root.mkdir(parents=True, exist_ok=True)
    _delete_of_dead(root)
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
        write_json(temporary / KEY, about)
        write_manifest(temporary)
        sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def _size_of(value: Any) -> int:
    """Return about how many bytes a text, a medium or a tensor takes; of numbers none."""
    if isinstance(value, dict):
        return sum(map(_size_of, value.values()))
    return len(value) if isinstance(value, str | bytes) else 0


def _publish(temporary: Path, folder: Path, about: dict[str, Any]) -> None:
    """Give a temporary folder its name; where another process was first, its folder stays."""
    aside = temporary.with_name(f"{temporary.stem}-old.tmp")
    try:
        if os.path.lexists(folder) and _open(folder, about, lambda _: None) is None:
            folder.rename(aside)  # it is damaged; who has it open can read on
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


def _delete_of_dead(root: Path) -> None:
    """Delete what processes of this machine left that ended while they wrote."""
    for path in root.glob(".*.tmp"):
        found = LEFTOVER.fullmatch(path.name)
        if found is not None and found[1] == socket.gethostname() and not is_alive(int(found[2])):
            shutil.rmtree(path, ignore_errors=True)


def _with_progress(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows, and show on a terminal how many there were, if it takes long."""
    shown = began = time.monotonic()
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
            if now - began > PATIENCE_S and now - shown > 0.2:
                sys.stderr.write(f"\r{counted(number, 'row')}")
                sys.stderr.flush()
                shown = now
    if shown != began:
        sys.stderr.write("\r" + " " * 30 + "\r")


def _cannot_write(root: Path, error: OSError) -> ResourceError:
    found = re.search(r"\[errno (\d+)\]", str(error), re.IGNORECASE)
    number = error.errno or (int(found[1]) if found else None)
    reason = os.strerror(number) if number else str(error)
    what = f"the cache of data sets cannot be written to: {reason.lower()}"
    way = "free some space there" if number in FULL else "allow it to be written to"
    hint = f"{way}, or name another folder: `HF_DATASETS_CACHE=DIR lora …`"
    return ResourceError(what, str(root), hint)


# ------------------------------------------------------------------------- what others keep there


def damaged_files(dataset: Any) -> list[str]:
    """Return the files of a data set of the Hub that are not what they were when first used.

    `datasets` keeps no sums of what it has prepared. So they are noted at the first use, beside
    our own data sets.
    """
    import datasets

    files = sorted(entry["filename"] for entry in dataset.cache_files)
    if not files:
        return []
    names = hashlib.sha256("\n".join(files).encode()).hexdigest()[:32]
    notes = Path(datasets.config.HF_DATASETS_CACHE) / "lora" / f"hub-{names}.json"
    sums = {file: sha256_of(Path(file)) for file in files}
    try:
        known = json.loads(read_bounded(notes))
    except (OSError, ValueError, RecursionError):
        known = None
    if isinstance(known, dict) and set(known) == set(files):
        return [file for file in files if known[file] != sums[file]]
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        write_json(notes, sums)
    except OSError as error:
        raise _cannot_write(notes.parent, error) from error
    return []


def forget_files(dataset: Any) -> None:
    """Forget the sums of a data set of the Hub, which has been prepared again."""
    import datasets

    files = sorted(entry["filename"] for entry in dataset.cache_files)
    names = hashlib.sha256("\n".join(files).encode()).hexdigest()[:32]
    notes = Path(datasets.config.HF_DATASETS_CACHE) / "lora" / f"hub-{names}.json"
    notes.unlink(missing_ok=True)
