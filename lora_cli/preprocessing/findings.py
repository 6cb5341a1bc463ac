"""Findings on the rows of a recipe: a table, warnings, and the data section of the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lora_cli.characters import aligned, shortened
from lora_cli.errors import Problem, printable
from lora_cli.recipe import Recipe

N_LABELS = 6  # with more labels, the table only shows their number and sizes
TEXT_WIDTH = 60  # columns of a text in a message


@dataclass(frozen=True)
class Pair:
    """Two similar rows: their locations, texts and labels."""

    row: str
    other: str
    text: str
    other_text: str
    label: str | None = None
    other_label: str | None = None


@dataclass(frozen=True)
class FlaggedRows:
    """Rows of a split with some property: their number, their share and a few examples."""

    rows: int
    share: float
    examples: list[Pair]

    def __str__(self) -> str:
        return f"{self.rows:,}{_percent(self.share)}" if self.rows else "0"


@dataclass(frozen=True)
class Overlap:
    """Rows of a split whose text is equal, or nearly equal, to a text of another split."""

    exact: FlaggedRows
    near: FlaggedRows | None
    of_sets: dict[str, FlaggedRows] = field(default_factory=dict)
    """The exact overlap of each set, if several are mixed."""


@dataclass(frozen=True)
class SplitFindings:
    """Findings on a split."""

    rows: int
    examples: int
    skipped_rows: int
    rows_without_example: int
    empty_rows: int
    control_token_rows: int
    """Rows with a control token, such as `</s>`, spelled out in a text."""
    control_tokens: str
    """How they are read, and where the first one is."""
    lengths: dict[str, int] | None
    """Length of a row before truncation, in tokens or another unit of the task: p50, p95, max.

    `total` is the sum after truncation. None if rows have no length."""
    cut_rows: int
    """Rows that are truncated to `max_length`."""
    divided_rows: int
    """Rows that were too long and became several examples."""
    unknown_share: float
    """Share of unknown tokens."""
    unknown_warning: str | None
    """A warning about unknown tokens, if there are many."""
    trained_tokens: float | None
    """Share of the tokens that a language model learns to predict."""
    labels: dict[str, int]
    duplicates: FlaggedRows
    """Rows whose text is equal to the text of an earlier row."""
    near_duplicates: FlaggedRows | None
    contradictions: FlaggedRows | None
    """Rows whose text occurs elsewhere with another label."""
    label_doubts: list[str] = field(default_factory=list)
    """Questions on labels that look alike, or do not occur in train."""
    cut_note: str | None = None
    """Describes which parts of the rows were truncated, if a row has several parts."""
    sets: dict[str, int] = field(default_factory=dict)
    """The number of rows in each set, if several are mixed."""
    shares: dict[str, float] = field(default_factory=dict)
    """The share of each set in an epoch, if the sets have weights."""


@dataclass
class Findings:
    """Findings on all splits; `overlap[split][other]` describes what two splits share."""

    recipe: Recipe
    max_length: int | None
    longer_hint: str = "raise `task.max_length`"
    unit: str = "token"
    length_limit: str = ""
    length_name: str = ""
    splits: dict[str, SplitFindings] = field(default_factory=dict)
    overlap: dict[str, dict[str, Overlap]] = field(default_factory=dict)

    def add_to(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the data section of a report with the findings added; existing facts win."""
        added = {
            name: {**self._in_report(split), **facts.get(name, {})}
            for name, split in self.splits.items()
        }
        overlap = {
            name: {other: _known(asdict(what)) for other, what in others.items()}
            for name, others in self.overlap.items()
        }
        return {**facts, **added, "overlap": overlap}

    def _in_report(self, split: SplitFindings) -> dict[str, Any]:
        """Return the findings of a split with the keys of a report, which contain the unit."""
        known: dict[str, Any] = _known(asdict(split))
        if (lengths := known.pop("lengths", None)) is not None:
            known[f"{self.unit}s"] = lengths
            known[f"unknown_{self.unit}s"] = known["unknown_share"]
        del known["unknown_share"]
        return known

    def problems(self) -> list[Problem]:
        """Return a problem for each overlap of held-out rows with train above `max_overlap`."""
        limit = self.recipe.data.check.max_overlap
        problems = []
        for name, others in self.overlap.items():
            if "train" not in others:
                continue
            mixed = self.splits[name].sets
            parts = [
                (
                    flagged,
                    mixed[set_name],
                    f"{name} rows of the set `{set_name}`",
                    f"data.mix.{set_name}.{name}",
                )
                for set_name, flagged in others["train"].of_sets.items()
            ] or [
                (others["train"].exact, self.splits[name].rows, f"{name} rows", f"data.{name}"),
            ]
            problems += [
                self._leak(flagged, total, rows, key)
                for flagged, total, rows, key in parts
                if flagged.share > limit
            ]
        return problems

    def _leak(self, flagged: FlaggedRows, total: int, rows: str, key: str) -> Problem:
        """Return the problem for held-out rows that also occur in train."""
        limit = self.recipe.data.check.max_overlap
        places = ", ".join(f"{e.row} (`{e.text}`) is {e.other}" for e in flagged.examples)
        return Problem(
            f"{flagged.rows:,} of {total:,} {rows}"
            f"{_percent(flagged.share)} also occur in train, and `max_overlap` allows "
            f"{100 * limit:g} %: {places}",
            self.recipe.at(key),
            "draw the rows from train, `{from: train, fraction: 0.1, disjoint: exact}`, "
            "remove them from one side, or, if this is meant, allow it with "
            f"`--set data.check.max_overlap={_limit_above(flagged.share):g}`",
        )

    def warnings(self) -> list[str]:
        """Return warnings about the data, one line each."""
        # warn once about unknown tokens: the splits have the same language
        unknown = (split.unknown_warning for split in self.splits.values())
        lines = list(filter(None, unknown))[:1]
        for name, split in self.splits.items():
            if split.rows_without_example:
                share = _percent(split.rows_without_example / split.rows)
                truncate = getattr(self.recipe.task, "truncate", None)
                hint = self.longer_hint
                if truncate == "right":
                    hint += ", or cut the beginning instead: `task.truncate: left`"
                lines.append(
                    f"{split.rows_without_example:,} of {split.rows:,}{share} {name} rows leave "
                    f"nothing to train within {self.length_limit}, and are left out: {hint}"
                )
            if split.control_token_rows:
                share = _percent(split.control_token_rows / split.rows)
                lines.append(
                    f"{split.control_token_rows:,}{share} {name} "
                    f"{_verb(split.control_token_rows, 'have')} control tokens in the text; "
                    f"{split.control_tokens}"
                )
            if split.cut_note:
                lines.append(f"{name}: {split.cut_note}")
            lines += split.label_doubts
            if split.contradictions and split.contradictions.rows:
                first = split.contradictions.examples[0]
                lines.append(
                    f"{split.contradictions} {name} {_verb(split.contradictions.rows, 'have')} a "
                    f"text that has another label elsewhere: {first.row} `{first.text}` is "
                    f"{first.label}, {first.other} is {first.other_label}"
                )
            for flagged, how in (
                (split.duplicates, "equal to"),
                (split.near_duplicates, "nearly equal to"),
            ):
                if flagged and flagged.rows:
                    are = _verb(flagged.rows, "are")
                    lines.append(f"{flagged} {name} {are} {how} an earlier one: {_first(flagged)}")
        for name, others in self.overlap.items():
            for other, overlap in others.items():
                for flagged, how in (
                    (overlap.exact, "equal to"),
                    (overlap.near, "nearly equal to"),
                ):
                    if flagged and flagged.rows:
                        are = _verb(flagged.rows, "are")
                        lines.append(
                            f"{flagged} {name} {are} {how} a row of {other}: {_first(flagged)}"
                        )
        return lines

    def table(self) -> str:
        """Format the findings as aligned columns, one for each split, with the warnings below."""
        rows: list[tuple[str, list[str]]] = [("data", list(self.splits))]
        splits = list(self.splits.values())

        def add(name: str, values: list[str], even_if_zero: bool = False) -> None:
            if even_if_zero or any(value not in ("", "0") for value in values):
                rows.append((name, values))

        add("rows", [f"{s.rows:,}" for s in splits])
        for name in dict.fromkeys(name for s in splits for name in s.sets):
            counts = [f"{n:,}{_percent(n / s.rows)}" if (n := s.sets.get(name, 0)) else "0"
                      for s in splits]  # fmt: skip
            add(f"rows of {short(name, 20)}", counts)
        for name in dict.fromkeys(name for s in splits for name in s.shares):
            shares = [f"{100 * s.shares[name]:.1f} %" if name in s.shares else "" for s in splits]
            add(f"{short(name, 20)} in an epoch", shares)
        if any(s.examples != s.rows for s in splits):
            add("examples", [f"{s.examples:,}" for s in splits])
        add("skipped rows", [f"{s.skipped_rows:,}" for s in splits])
        add("with control tokens", [f"{s.control_token_rows:,}" for s in splits])
        add("empty rows", [f"{s.empty_rows:,}" for s in splits])
        add("rows without example", [f"{s.rows_without_example:,}" for s in splits])
        lengths = [s.lengths for s in splits]
        add(f"{self.unit}s p50/p95/max", ["" if n is None else _quantiles(n) for n in lengths])
        cut = [f"{s.cut_rows:,}{_percent(s.cut_rows / s.rows)}" for s in splits]
        divided = [f"{s.divided_rows:,}{_percent(s.divided_rows / s.rows)}" for s in splits]
        has_divided = any(s.divided_rows for s in splits)
        if self.max_length and (not has_divided or any(s.cut_rows for s in splits)):
            add(f"cut at {self.length_name}", cut, even_if_zero=True)
        add(f"divided at {self.length_name}", divided if has_divided else [])
        if any(s.unknown_warning for s in splits):
            add("unknown tokens", [f"{100 * s.unknown_share:.1f} %" for s in splits])
        trained = [s.trained_tokens for s in splits]
        add("trained tokens", ["" if p is None else f"{100 * p:.1f} %" for p in trained])
        rows += _label_rows(splits)
        add("duplicates", [str(s.duplicates) for s in splits], even_if_zero=True)
        add("near duplicates", [_text_of(s.near_duplicates) for s in splits])
        add("contradictions", [_text_of(s.contradictions) for s in splits])
        for other in self.splits:
            overlaps = [self.overlap.get(name, {}).get(other) for name in self.splits]
            if any(overlaps):
                add(
                    f"also in {other}",
                    [_text_of(o.exact if o else None) for o in overlaps],
                    even_if_zero=True,
                )
                add(f"nearly in {other}", [_text_of(o.near if o else None) for o in overlaps])
        lines = _aligned(rows)
        warnings = [f"warning: {line}" for line in self.warnings()]
        if self.recipe.data.streaming:
            lines.append("train is streamed: its rows were not inspected for duplicates or overlap")
        max_warnings = max(25 - len(lines), 4)
        if len(warnings) > max_warnings:
            n_hidden = len(warnings) - max_warnings + 1
            warnings = [
                *warnings[: max_warnings - 1],
                f"({n_hidden} more warnings; report.json has them all)",
            ]
        return "\n".join(map(printable, [*lines, *warnings]))


# --------------------------------------------------------------------------------- the table


def _label_rows(splits: list[SplitFindings]) -> list[tuple[str, list[str]]]:
    names = list(dict.fromkeys(name for split in splits for name in split.labels))
    if len(names) <= N_LABELS:
        return [
            (f"label {short(name, 20)}", [
                f"{s.labels[name]:,}{_percent(s.labels[name] / s.rows)}" for s in splits
            ])
            for name in names
        ]  # fmt: skip
    present = [[count for count in split.labels.values() if count] for split in splits]
    return [
        (f"labels, of {len(names)}", [f"{len(counts)}" for counts in present]),
        ("rows of a label", [f"{min(counts)} to {max(counts)}" for counts in present]),
    ]


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    # escaped characters are wider, so they are escaped before the columns are aligned
    return aligned([[printable(cell) for cell in (name, *values)] for name, values in rows])


def _text_of(flagged: FlaggedRows | None) -> str:
    return "" if flagged is None else str(flagged)


def _quantiles(lengths: dict[str, int]) -> str:
    return "/".join(str(lengths[key]) for key in ("p50", "p95", "max"))


def _percent(share: float) -> str:
    if not share:
        return ""
    return " (<0.1 %)" if share < 0.0005 else f" ({100 * share:.1f} %)"


def _limit_above(share: float) -> float:
    """Round a share up to two digits, for a limit that allows it."""
    return min(float(np.ceil(share * 100) / 100), 1.0)


def short(text: str, width: int = TEXT_WIDTH) -> str:
    """Shorten a text to one line of at most `width` columns."""
    return shortened(" ".join(text.split()), width)


def _verb(count: int, verb: str) -> str:
    """Return `row` or `rows` with the verb in the same number: `row is`, `rows are`."""
    singular = {"are": "is", "have": "has"}
    return f"row {singular[verb]}" if count == 1 else f"rows {verb}"


def _first(flagged: FlaggedRows) -> str:
    first = flagged.examples[0]
    return f"{first.row} `{first.text}` and {first.other}"


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts without unknown values, and without empty facts about sets."""
    of_sets = ("of_sets", "sets", "shares")
    return {
        k: _without_none(v) for k, v in facts.items() if v is not None and (v or k not in of_sets)
    }


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
