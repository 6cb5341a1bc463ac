"""Inspect the encoded splits before the model is loaded: their contents, and their overlap."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.characters import difference_of_form
from lora_cli.data.load_rows import Rows
from lora_cli.data.row_texts import text_of
from lora_cli.errors import LoraError, counted, printable
from lora_cli.preprocessing.encode import load_data
from lora_cli.preprocessing.findings import (
    Findings,
    FlaggedRows,
    Overlap,
    Pair,
    SplitFindings,
    short,
)
from lora_cli.preprocessing.mixture import mixture_of
from lora_cli.preprocessing.near_duplicates import (
    Fingerprints,
    Indices,
    near_repeated,
    near_shared,
    repeated,
    shared,
)
from lora_cli.preprocessing.stream import Stream
from lora_cli.recipe import Recipe
from lora_cli.tasks import build_training_task
from lora_cli.tasks.classification.labels import look_alikes
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import MEDIA, Encoded

N_SHOWN = 3  # examples of each finding
N_ENCODED = 10  # rows that are encoded to check their first tokens


def pass_gate(task: Task, data: dict[str, Encoded]) -> Findings:
    """Inspect the splits, print the findings on stderr, and reject leaks.

    Raises:
        LoraError: If validation or test share more with train than `data.check.max_overlap`, or
            one of the first streamed rows is invalid.
    """
    if task.recipe.data.streaming:
        Stream(task).check_start()
    findings = examine(task, data)
    if findings.splits:
        sys.stderr.write(findings.table() + "\n")
    if problems := findings.problems():
        raise LoraError(problems)
    return findings


def inspect_data(recipe: Recipe) -> tuple[Task, dict[str, Encoded]]:
    """Read, encode and inspect the data of a recipe as training would, without the model."""
    task = build_training_task(recipe)
    task.load_processor()
    data = load_data(task)
    pass_gate(task, data)
    return task, data


def examine(task: Task, data: dict[str, Encoded]) -> Findings:
    """Return the findings on each split, and on what the splits share."""
    findings = Findings(
        task.recipe,
        task.max_length,
        task.longer_hint,
        task.unit,
        task.length_limit,
        task.length_name,
    )
    scans = {name: _Scan(task, name, split) for name, split in data.items()}
    for name, scan in scans.items():
        findings.splits[name] = scan.findings()
        earlier = [other for other in scans if other != name][: len(findings.splits) - 1]
        if earlier:
            findings.overlap[name] = {other: scan.overlap(scans[other]) for other in earlier}
    return findings


def _is_known(answer: str | None) -> bool:
    return answer is not None


class _Scan:
    """One pass over the rows of a split: fingerprints of their texts, and their labels."""

    def __init__(self, task: Task, name: str, split: Encoded) -> None:
        self.task, self.name, self.split, self.rows = task, name, split, split.rows
        self.near = task.recipe.data.check.near_duplicates
        self.targets: list[str | None] = []  # None for rows without a label or an answer
        self.empty_rows = 0
        self.control_rows: list[tuple[int, str]] = []  # (row, its first control token)
        self.labels: Counter[str] = Counter()
        self.texts = Fingerprints.of(self._read(), self.near)

    def _read(self) -> Iterator[list[str]]:
        columns = self.task.compared_columns()
        start = 0
        for batch in self.rows.batches(1000):
            texts = [text_of(row, columns) for row in batch]
            control_tokens = enumerate(map(self.task.control_token_in, batch), start)
            self.control_rows += [(i, token) for i, token in control_tokens if token is not None]
            start += len(batch)
            self.empty_rows += sum(not text.strip() for text in texts)
            for row in batch:
                self.targets.append(self.task.answer_of(row))
                if self.targets[-1] is not None:
                    self.labels.update(self.task.labels_of(row) or ())
            yield texts

    def findings(self) -> SplitFindings:
        split, task = self.split, self.task
        of_row, first, inverse = np.unique(
            split.examples.data.column("row").to_numpy(), return_index=True, return_inverse=True
        )
        full = split.full_lengths[first]
        is_long = (
            full > split.lengths[first]
        )  # rows that were cut or split are longer than their example
        kept_lengths = np.bincount(inverse, split.lengths, minlength=len(of_row))
        is_cut = is_long & (kept_lengths < full)
        names = task.label_names
        unknown_share, unknown_warning = task.unknown_input(self.name, self.rows, split.examples)
        return SplitFindings(
            rows=len(self.rows),
            examples=len(split),
            skipped_rows=len(self.rows.skipped),
            rows_without_example=split.rows_without_example,
            empty_rows=self.empty_rows,
            control_token_rows=len(self.control_rows),
            control_tokens=self._describe_control_tokens(),
            lengths=self._lengths(full),
            cut_rows=int(is_cut.sum()),
            divided_rows=int((is_long & ~is_cut).sum()),
            cut_note=task.cut_note(split),
            unknown_share=unknown_share,
            unknown_warning=unknown_warning,
            trained_tokens=task.trained_share(split),
            labels={name: self.labels[name] for name in names},
            duplicates=self._flagged(repeated(self.texts), self.rows),
            near_duplicates=(
                self._flagged(near_repeated(self.texts), self.rows) if self.near else None
            ),
            contradictions=self._contradictions() if any(map(_is_known, self.targets)) else None,
            label_doubts=self._label_doubts(names) if self.name == "train" else [],
            sets={name: len(positions) for name, positions in self.rows.sets.items()},
            shares=self._shares() if self.name == "train" else {},
        )

    def _shares(self) -> dict[str, float]:
        """Return the share of each set in an epoch, if the sets have weights."""
        examples = self.split.examples
        if self.task.recipe.train.packing:
            examples = self.task.packed(self.split)
        mixture = mixture_of(self.task.recipe, self.split, examples)
        if mixture is None:
            return {}
        total = sum(mixture.quotas)
        pairs = zip(self.rows.sets, mixture.quotas, strict=True)
        return {name: quota / total for name, quota in pairs}

    def _lengths(self, full: NDArray[np.int64]) -> dict[str, int] | None:
        """Return quantiles of the rows' lengths, and the total after truncation.

        None if the task's rows have no length.
        """
        if self.task.max_length is None:
            return None
        p50, p95 = (int(q) for q in np.percentile(full, (50, 95), method="lower"))
        total = int(self.split.lengths.sum())
        return {"p50": p50, "p95": p95, "max": int(full.max()), "total": total}

    def _describe_control_tokens(self) -> str:
        """Describe how control tokens in the texts are read, and where the first one is."""
        if not self.control_rows:
            return ""
        row, token = self.control_rows[0]
        first = f"the first is `{token}` at {self.rows.place(row)}"
        if self.task.reads_control_tokens:
            how = "`task.split_special_tokens: true` reads them as text"
            return (
                f"{first}; each is read as the token, as if the tokenizer had written it: {how}"
                f"{self._describe_double_bos()}"
            )
        return f"{first}; they are read as text"

    def _describe_double_bos(self) -> str:
        """Return advice if a text spells out the BOS token, which the tokenizer adds as well."""
        bos = getattr(getattr(self.task, "tokenizer", None), "bos_token_id", None)
        for row, _ in self.control_rows[:N_ENCODED]:
            for example in self.task.encode([self.rows[row]])[0]:
                if bos is not None and list(example.get("input_ids", ())[:2]) == [bos, bos]:
                    return (
                        "; the tokenizer begins each text with this token too, so there are two at "
                        f"the beginning of {self.rows.place(row)}: remove it from the texts"
                    )
        return ""

    def _label_doubts(self, names: list[str]) -> list[str]:
        """Return questions on labels that may mean the same, or have no rows."""
        questions = [
            f"the labels {' and '.join(f'`{printable(name)}`' for name in similar)} look alike "
            f"({' and '.join(counted(self.labels[name], 'row') for name in similar)})"
            + (
                f", they differ in nothing but {how}"
                if (how := difference_of_form(*similar[:2]))
                else ""
            )
            + ": are they one?"
            for similar in look_alikes(names)
        ]
        absent = [name for name in names if not self.labels[name]]
        if absent:
            others = f", nor of {len(absent) - 1} others" if len(absent) > 1 else ""
            questions.append(f"train has no row of the label `{printable(absent[0])}`{others}")
        if "-1" in names:
            count = counted(self.labels["-1"], "row")
            questions.append(f"-1 is taken for a label ({count}): does it stand for none?")
        return questions

    def overlap(self, other: _Scan) -> Overlap:
        """Return the rows of this split that are equal, or nearly equal, to rows of another."""
        near = near_shared(self.texts, other.texts) if self.near else None
        rows, neighbours = shared(self.texts, other.texts)
        by_set = {}
        for name, positions in self.rows.sets.items():
            inside = np.isin(rows, positions)
            pairs = rows[inside], neighbours[inside]
            by_set[name] = self._flagged(pairs, other.rows, total=len(positions))
        return Overlap(
            self._flagged((rows, neighbours), other.rows),
            None if near is None else self._flagged(near, other.rows),
            by_set,
        )

    def _contradictions(self) -> FlaggedRows:
        """Return the rows with equal texts and different labels."""
        answered = np.flatnonzero([_is_known(target) for target in self.targets])
        targets = np.unique([str(self.targets[i]) for i in answered], return_inverse=True)[1]
        exact = self.texts.exact[answered]
        _, first, inverse = np.unique(exact, return_index=True, return_inverse=True)
        differs = targets != targets[first][inverse]
        opposed = np.zeros(len(first), dtype=bool)
        opposed[inverse[differs]] = True
        positions = np.flatnonzero(differs)
        pairs = answered[positions], answered[first[inverse[positions]]]
        flagged = self._flagged(pairs, self.rows, labels=True)
        count = int(opposed[inverse].sum())
        return FlaggedRows(count, count / len(self.rows), flagged.examples)

    def _read_text(self, row: dict[str, Any]) -> str:
        """Return the part of a row that a person compares: its text, or the name of its image."""
        if any(field.kind in MEDIA for field in self.task.fields()):
            return short(self.task.shown_input(row))
        return short(text_of(row, self.task.compared_columns()))

    def _flagged(
        self, pairs: tuple[Indices, Indices], others: Rows, labels: bool = False, total: int = 0
    ) -> FlaggedRows:
        rows, neighbours = pairs
        examples = [
            Pair(
                self.rows.place(row),
                others.place(other),
                self._read_text(self.rows[row]),
                self._read_text(others[other]),
                self.targets[row] if labels else None,
                self.targets[other] if labels else None,
            )
            for row, other in zip(
                rows[:N_SHOWN].tolist(), neighbours[:N_SHOWN].tolist(), strict=True
            )
        ]
        return FlaggedRows(len(rows), len(rows) / (total or len(self.rows)), examples)
