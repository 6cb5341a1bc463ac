"""Git LFS pointers: small text files in place of large files that were not downloaded.

`git clone` without the extension, and the button that downloads a repository, leave three lines of
text by the name of each data file, picture and file of weights.
"""

from __future__ import annotations

from pathlib import Path

POINTER = b"version https://git-lfs"  # how each begins
POINTS = "a pointer of Git LFS, and not the file itself"
FETCH = "fetch the file: `git lfs pull` where it was cloned; or download it again"


def is_pointer(path: Path) -> bool:
    """Return whether a file is a pointer; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False
