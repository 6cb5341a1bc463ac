"""Lock the folder that an export creates, so that no other process writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.folder_lock import FolderLock


@contextmanager
def locked_target(to: Path) -> Iterator[None]:
    """Lock a folder that does not exist yet or is empty, so that no other process writes it.

    Raises:
        LoraError: If it is not empty, or another process is writing it.
    """
    to.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(to.absolute().parent, "--to", for_one=to.absolute())
    try:
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise LoraError(f"{to} is not empty", "--to", "choose a folder that is not there yet")
        yield
    finally:
        lock.release()
