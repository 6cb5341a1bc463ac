"""Text files that belong together line by line, such as a text and its translation.

`train.{en,de}.gz` stands for two files, `train.en.gz` and `train.de.gz`; row n has line n of each,
in the columns `en` and `de`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from lora_cli.errors import LoraError

BRACES = re.compile(r"\{([^{},]+(?:,[^{},]+)+)\}")
BORDERS = re.compile(r"([._-])")  # of the parts of a name


def parts_of(path: Path) -> dict[str, Path]:
    """Return the files that a name with braces stands for, by column; none, if it has none."""
    match = BRACES.search(path.name)
    if match is None or path.exists():
        return {}
    before, after = path.name[: match.start()], path.name[match.end() :]
    return {part: path.with_name(f"{before}{part}{after}") for part in match[1].split(",")}


def joined_name(first: Path, second: Path) -> Path:
    """Return the name that stands for two files, in this order.

    Raises:
        LoraError: If there is none: they are in two folders, or are the same.
    """
    if first.absolute().parent != second.absolute().parent or first.name == second.name:
        raise LoraError(
            f"{first} and {second} are not two files of one folder",
            "FILE",
            "put paired files next to each other: train.en.txt, train.de.txt",
        )
    one, two = BORDERS.split(first.name), BORDERS.split(second.name)
    same = [a == b for a, b in zip(one, two, strict=False)]
    if len(one) == len(two) and same.count(False) == 1:
        at = same.index(False)
        return first.with_name("".join([*one[:at], f"{{{one[at]},{two[at]}}}", *one[at + 1 :]]))
    return first.with_name(f"{{{first.name},{second.name}}}")


def read_parallel(
    parts: dict[str, Path], lines: dict[str, Iterator[tuple[int, str]]]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number and the text of each line of several files together.

    Raises:
        LoraError: If one of them ends before the others.
    """
    for number, together in enumerate(zip_longest(*lines.values()), 1):
        texts = {}
        for name, line in zip(lines, together, strict=True):
            if line is None:
                raise LoraError(
                    f"{parts[name].name} ends before line {number}, and the other does not",
                    str(parts[name]),
                    "paired files must have the same number of lines",
                )
            texts[name] = line[1].rstrip("\r\n")
        yield number, texts
