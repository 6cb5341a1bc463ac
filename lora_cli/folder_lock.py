"""One process at a time writes into a folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from lora_cli.errors import LoraError

LOCK = ".lock"


class FolderLock:
    """Keeps other processes from writing into a folder, until it is released or its process ends.

    It is the system's record lock on the file `.lock`, not the file itself: a process that was
    killed leaves no lock behind, and the processes that it had forked do not hold it.

    Args:
        folder: The folder, which must exist.
        at: Where it is named, for errors.
        for_one: A file or folder in it that is to be made: others in the folder are not locked.

    Raises:
        LoraError: If another process has it, with the number of that process.
    """

    def __init__(self, folder: Path, at: str | None = None, for_one: Path | None = None) -> None:
        self.path = folder / (LOCK if for_one is None else f".{for_one.name}{LOCK}")
        folder = folder if for_one is None else for_one
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
        option = "--to" if at == "--to" else "-o"  # of a merge, or of a training
        return LoraError(what, at, f"wait for it, or choose another folder with `{option} DIR`")

    def release(self) -> None:
        """Release the lock, so that other processes may use the folder."""
        self.path.unlink(missing_ok=True)
        self.file.close()
