"""From the recipe's `data` section to rows: the train, validation and test splits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli import __version__
from lora_cli.data.files import RawRow, kind_of, read_rows
from lora_cli.data.splits import draw
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.files import sha256_of
from lora_cli.recipe import FormatSpec, HeldOutSpec, Recipe
from lora_cli.recipe.spec import is_file

SPLITS = ("train", "validation", "test")
SPLIT_FILES = {
    "train": r"train(ing)?",
    "validation": r"(validation|valid|val|dev)",
    "test": r"(test|eval)",
}
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """The rows of a split, kept on the disk and read one at a time.

    `self[i]` is a dictionary of the columns of row i, `self.place(i)` says where it stands.
    """

    dataset: Any  # datasets.Dataset: columns row (JSON), place, fault; or the Hub's own columns
    source: str
    sha256: str
    indices: Indices
    label_names: dict[str, list[str]] = field(default_factory=dict)  # the Hub's ClassLabel columns
    skipped: tuple[str, ...] = ()
    dropped: int = 0  # rows that would have stood on both sides of a held-out split

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._decode(self.dataset[int(self.indices[i])])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for batch in self.batches(1000) for row in batch)

    def batches(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows in lists of at most `size`."""
        for start in range(0, len(self), size):
            columns = self.dataset[self.indices[start : start + size]]
            count = len(next(iter(columns.values())))
            yield [self._decode({k: v[i] for k, v in columns.items()}) for i in range(count)]

    def _decode(self, stored: dict[str, Any]) -> dict[str, Any]:
        return json.loads(stored["row"]) if set(stored) == STORED else stored

    def place(self, i: int) -> str:
        """Return where row i stands: `train.csv:17`."""
        index = int(self.indices[i])
        if set(self.dataset.column_names) == STORED:
            return str(self.dataset[index]["place"])
        return f"{self.source}[{index}]"

    @property
    def columns(self) -> list[str]:
        """Names of the columns, from the first rows."""
        first = [self[i] for i in range(min(100, len(self)))]
        return list(dict.fromkeys(name for row in first for name in row))

    def select(self, positions: Indices, skipped: Sequence[str] = ()) -> Rows:
        """Return the rows at some positions of this split."""
        return replace(self, indices=self.indices[positions], skipped=(*self.skipped, *skipped))

    def content_sha256(self) -> str:
        """Return the SHA-256 of the rows themselves, in their order."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()


STORED = {"row", "place", "fault"}


def load_rows(recipe: Recipe, splits: Sequence[str] = SPLITS) -> dict[str, Rows]:
    """Return the rows of each split that the recipe names.

    Args:
        recipe: Its `data` section says where rows come from.
        splits: Which of them are wanted; held-out rows need the split that they are drawn from.

    Raises:
        LoraError: With the rows that cannot be read, unless `data.on_bad_row` is `skip`.
    """
    data = recipe.data
    specs = {name: getattr(data, name) for name in SPLITS if getattr(data, name) is not None}
    if data.streaming:
        specs.pop("train")
    whole = {n: _named(recipe, n, s) for n, s in specs.items() if isinstance(s, str)}
    for name in ("test", "validation"):
        held_out = specs.get(name)
        if isinstance(held_out, HeldOutSpec):
            parent = held_out.from_
            if parent not in whole:
                raise LoraError(
                    f"there is no split `{parent}` to draw rows from",
                    recipe.at(f"data.{name}.from"),
                    did_you_mean(parent, whole, "the splits are"),
                )
            whole[name], whole[parent] = _hold_out(recipe, whole[parent], name, held_out)
    for name, rows in whole.items():
        if not len(rows):
            raise LoraError(f"the {name} split has no rows", rows.source)
    return {name: whole[name] for name in SPLITS if name in whole and name in splits}


def stream_rows(recipe: Recipe) -> Iterator[RawRow]:
    """Yield the train rows as they come, again and again."""
    data = recipe.data
    assert isinstance(data.train, str)
    while True:
        if data.name:
            for number, row in enumerate(_load_hub(recipe, data.train, streaming=True)):
                yield RawRow(row, f"{data.name}[{number}]")
        else:
            for file in _files(recipe, "train", data.train):
                yield from read_rows(file, data.format)


def _hold_out(recipe: Recipe, parent: Rows, name: str, spec: HeldOutSpec) -> tuple[Rows, Rows]:
    """Return (held-out rows, what stays)."""
    task = recipe.task
    text, label = _text_of(recipe), getattr(task, "label_column", None)
    rows = list(parent)
    for column in filter(None, (spec.group_by, label if spec.stratify else None)):
        if rows and column not in rows[0]:
            raise LoraError(
                f"there is no column `{column}`",
                recipe.at(f"data.{name}"),
                did_you_mean(column, parent.columns, "the columns are"),
            )
    held, kept = draw(
        [text(row) for row in rows],
        spec.fraction,
        # another seed for each, so that the two draws do not pick the same positions
        seed=(recipe.data.split_seed, SPLITS.index(name)),
        disjoint=spec.disjoint,
        strata=[str(row[label]) for row in rows] if spec.stratify and label else None,
        groups=[str(row[spec.group_by]) for row in rows] if spec.group_by else None,
        at=recipe.at(f"data.{name}"),
    )
    dropped = len(rows) - len(held) - len(kept)
    return parent.select(held), replace(parent.select(kept), dropped=parent.dropped + dropped)


def _text_of(recipe: Recipe) -> Any:
    """Return a function from a row to the text that must not stand on both sides."""
    task = recipe.task
    if task.type == "sequence_classification":
        names = [task.text_column, task.text_pair_column]
    else:
        names = [task.text_column, task.prompt_column, task.messages_column]
    columns = [name for name in names if name] or ["text", "instruction", "input"]
    return lambda row: "\n".join(
        value if isinstance(value := row[name], str) else json.dumps(value, default=str)
        for name in columns
        if row.get(name) is not None
    )


def _named(recipe: Recipe, split: str, text: str) -> Rows:
    """Return the rows of a split given as a name, a slice or a file."""
    name, part = _slice(text, recipe.at(f"data.{split}"))
    rows = (
        _hub_rows(recipe, name)
        if recipe.data.name
        else _file_rows(recipe, _files(recipe, split, name))
    )
    return rows.select(np.arange(len(rows))[_positions(part, len(rows))]) if part else rows


def _slice(text: str, at: str) -> tuple[str, str]:
    """Divide `train[:80%]` into its name and its slice."""
    match = re.fullmatch(r"(.*?)(?:\[(-?\d*%?:-?\d*%?)\])?", text)
    if not match or "[" in match[1]:
        raise LoraError(f"`{text}` is not a slice", at, "a slice is `train[:80%]` or `train[:500]`")
    return match[1], match[2] or ""


def _positions(part: str, count: int) -> slice:
    def bound(text: str) -> int | None:
        if not text:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)

    start, _, stop = part.partition(":")
    return slice(bound(start), bound(stop))


# ------------------------------------------------------------------------------------- files


def _files(recipe: Recipe, split: str, name: str) -> list[Path]:
    """Return the files of a split, in order."""
    data = recipe.data
    at = recipe.at(f"data.{split}")
    pattern = Path(name if is_file(name) else (data.path or ""))
    if not is_file(name):
        at = recipe.at("data.path")
    if pattern.is_dir():
        files = [f for f in sorted(pattern.rglob("*")) if f.is_file() and _readable(f, data.format)]
        by_split = [f for f in files if _belongs(f.relative_to(pattern), name)]
        named = any(_belongs(f.relative_to(pattern), other) for f in files for other in SPLITS)
        files = by_split if named else (files if name == "train" else [])
    elif pattern.is_file():
        files = [pattern] if is_file(name) or name == "train" else []
    else:
        folder = next(p for p in pattern.parents if not re.search(r"[*?\[]", str(p)))
        files = sorted(folder.glob(str(pattern.relative_to(folder)))) if folder.is_dir() else []
        if not files:
            beside = [str(f) for f in pattern.parent.glob("*")] if folder.is_dir() else []
            raise LoraError(
                f"there is no file {pattern}",
                at,
                did_you_mean(str(pattern), beside, "beside it are") if beside else None,
            )
        files = files if is_file(name) or name == "train" else []
    if not files:
        raise LoraError(
            f"{pattern} has no split `{name}`",
            recipe.at(f"data.{split}"),
            "name a file, or draw rows: `{from: train, fraction: 0.1}`",
        )
    return files


def _readable(file: Path, spec: FormatSpec) -> bool:
    try:
        return not file.name.startswith(".") and bool(kind_of(file, spec))
    except LoraError:
        return False


def _belongs(file: Path, split: str) -> bool:
    """Return whether a file's name or folder says that it is of a split."""
    pattern = SPLIT_FILES.get(split, re.escape(split))
    return any(re.search(rf"(^|[^a-z]){pattern}([^a-z]|$)", part.lower()) for part in file.parts)


def _file_rows(recipe: Recipe, files: list[Path]) -> Rows:
    import datasets

    form = recipe.data.format
    hashes = [sha256_of(file) for file in files]
    sha256 = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def stored() -> Iterator[dict[str, str]]:
        for file in files:
            for row in read_rows(file, form):
                columns = json.dumps(row.columns, ensure_ascii=False, default=str)
                yield {"row": columns, "place": row.place, "fault": row.fault}

    text = datasets.Value("string")
    dataset = cached_dataset(
        stored,
        [sha256, form.model_dump_json(), *(file.name for file in files)],
        datasets.Features({"row": text, "place": text, "fault": text}),
    )
    source = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    rows = Rows(dataset, source, sha256, np.arange(len(dataset)))
    faults = {i: f for i, f in enumerate(dataset["fault"]) if f}
    return without(rows, faults, recipe)


def without(rows: Rows, faults: dict[int, str], recipe: Recipe) -> Rows:
    """Return the rows without the faulty ones; unless they may be skipped, that is an error.

    Args:
        rows: A split.
        faults: What is wrong, by position.
        recipe: Its `data.on_bad_row` decides.
    """
    if not faults:
        return rows
    places = [f"{rows.place(i)}: {fault}" for i, fault in faults.items()]
    if recipe.data.on_bad_row == "error":
        problems = [Problem(fault, rows.place(i)) for i, fault in list(faults.items())[:10]]
        more = f"; {len(faults) - 10} more rows are like these" if len(faults) > 10 else ""
        last = problems[-1]
        problems[-1] = Problem(
            last.what,
            last.at,
            f"mend the rows, or pass them over with `--set data.on_bad_row=skip`{more}",
        )
        raise LoraError(problems)
    keep = np.array([i for i in range(len(rows)) if i not in faults], dtype=np.int64)
    return rows.select(keep, places)


def without_fault(
    rows: Iterator[RawRow], fault_of: Callable[[dict[str, Any]], str], recipe: Recipe
) -> Iterator[dict[str, Any]]:
    """Yield the columns of streamed rows; a faulty row stops, unless rows may be skipped."""
    for row in rows:
        fault = row.fault or fault_of(row.columns or {})
        if not fault:
            assert row.columns is not None
            yield row.columns
        elif recipe.data.on_bad_row == "error":
            raise LoraError(
                fault,
                row.place,
                "mend the row, or pass such rows over with `--set data.on_bad_row=skip`",
            )


def cached_dataset(generator: Any, key: Sequence[str], features: Any) -> Any:
    """Return a data set that is made once and then read from the disk.

    Args:
        generator: Function that yields the rows.
        key: What the rows depend on; the cache is named by its hash.
        features: Types of the columns.
    """
    import datasets

    digest = hashlib.sha256(json.dumps([__version__, *key]).encode()).hexdigest()
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(generator, features, fingerprint=digest[:32])
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # the reader's own error says more
    finally:
        if shown:
            datasets.enable_progress_bars()


# --------------------------------------------------------------------------------------- Hub


def _load_hub(recipe: Recipe, split: str, streaming: bool = False) -> Any:
    import datasets

    data = recipe.data
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            data.name, data.config, split=split, revision=data.revision, streaming=streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoraError(
            f"cannot load `{data.name}`: {reason}",
            recipe.at("data.name"),
            "a local file is given as `data.path`",
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _hub_rows(recipe: Recipe, name: str) -> Rows:
    import datasets

    dataset = _load_hub(recipe, name)
    names = {
        column: list(feature.names)
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    source = "/".join(filter(None, (recipe.data.name, recipe.data.config, name)))
    return Rows(dataset, source, dataset._fingerprint, np.arange(len(dataset)), names)
