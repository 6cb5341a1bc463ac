"""Read parallel text files, whose lines correspond, such as a text and its translation.

`train.{en,de}.gz` stands for two files, `train.en.gz` and `train.de.gz`. Row n has line n of each,
in the columns `en` and `de`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from lora_cli.errors import LoraError

BRACES = re.compile(r"\{([^{},]+(?:,[^{},]+)+)\}")
SEPARATORS = re.compile(r"([._-])")  # separators of the parts of a file name


def parts_of(path: Path) -> dict[str, Path]:
    """Return the files that a name with braces stands for, by column; empty without braces."""
    match = BRACES.search(path.name)
    if match is None or path.exists():
        return {}
    before, after = path.name[: match.start()], path.name[match.end() :]
    return {part: path.with_name(f"{before}{part}{after}") for part in match[1].split(",")}


def paired_name(first: Path, second: Path) -> Path:
    """Return a name with braces that stands for two files, in this order.

    Raises:
        LoraError: If the files are in different folders, or are the same.
    """
    if first.absolute().parent != second.absolute().parent or first.name == second.name:
        raise LoraError(
            f"{first} and {second} are not two files of one folder",
            "FILE",
            "put paired files next to each other: train.en.txt, train.de.txt",
        )
    first_parts, second_parts = SEPARATORS.split(first.name), SEPARATORS.split(second.name)
    equal = [a == b for a, b in zip(first_parts, second_parts, strict=False)]
    if len(first_parts) == len(second_parts) and equal.count(False) == 1:
        i = equal.index(False)
        return first.with_name(
            "".join(
                [*first_parts[:i], f"{{{first_parts[i]},{second_parts[i]}}}", *first_parts[i + 1 :]]
            )
        )
    return first.with_name(f"{{{first.name},{second.name}}}")


def read_parallel(
    parts: dict[str, Path], lines: dict[str, Iterator[tuple[int, str]]]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each line, and its text in each file.

    Raises:
        LoraError: If one file has fewer lines than the others.
    """
    for number, line_of_each in enumerate(zip_longest(*lines.values()), 1):
        texts = {}
        for name, line in zip(lines, line_of_each, strict=True):
            if line is None:
                raise LoraError(
                    f"{parts[name].name} ends before line {number}, and the other does not",
                    str(parts[name]),
                    "paired files must have the same number of lines",
                )
            texts[name] = line[1].rstrip("\r\n")
        yield number, texts
