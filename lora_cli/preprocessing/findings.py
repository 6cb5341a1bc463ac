"""What is found in the rows before a model is loaded: a table, warnings, facts of the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lora_cli.characters import aligned, shortened
from lora_cli.errors import Problem, printable
from lora_cli.recipe import Recipe

N_LABELS = 6  # with more, the table says how many there are and how large
TEXT_WIDTH = 60  # columns of a text that is shown


@dataclass(frozen=True)
class Pair:
    """Two rows that are alike: where they stand, and what they say."""

    row: str
    other: str
    text: str
    other_text: str
    label: str | None = None
    other_label: str | None = None


@dataclass(frozen=True)
class Found:
    """How many rows of a split something is true of, with a few of them."""

    rows: int
    share: float
    examples: list[Pair]

    def __str__(self) -> str:
        return f"{self.rows:,}{_percent(self.share)}" if self.rows else "0"


@dataclass(frozen=True)
class Overlap:
    """What a split shares with another: rows whose text is equal, or nearly."""

    exact: Found
    near: Found | None
    of_sets: dict[str, Found] = field(default_factory=dict)
    """Of the rows of each set, where several are mixed: those whose text is equal."""


@dataclass(frozen=True)
class SplitFindings:
    """What is in a split."""

    rows: int
    examples: int
    skipped_rows: int
    rows_without_example: int
    empty_rows: int
    control_token_rows: int
    """Rows with a control token, such as `</s>`, spelled out in a text."""
    control_tokens: str
    """What is made of them, and where the first stands."""
    lengths: dict[str, int] | None
    """Tokens of a row before it is cut (or what else the task counts): p50, p95, max, and the
    total that is left; None where a row has no length."""
    cut_rows: int
    """Rows of which `max_length` takes tokens away."""
    divided_rows: int
    """Rows that were too long and became several examples."""
    unknown_share: float
    """Share of the tokens that stand for what the tokenizer does not know."""
    unknown_warning: str | None
    """What to say of them, if they are many."""
    trained_tokens: float | None
    """Share of the tokens that a language model learns to predict."""
    labels: dict[str, int]
    duplicates: Found
    """Rows whose text is that of an earlier row."""
    near_duplicates: Found | None
    contradictions: Found | None
    """Rows whose text stands elsewhere with another label."""
    label_doubts: list[str] = field(default_factory=list)
    """Labels that look like others, or that train does not have."""
    cut_note: str | None = None
    """What was cut of the rows, where a row has several parts."""
    sets: dict[str, int] = field(default_factory=dict)
    """The rows of each set, where several are mixed."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of the examples of an epoch, the share of each set that has a weight."""


@dataclass
class Findings:
    """What was found in all splits; `overlap[split][other]` says what is shared."""

    recipe: Recipe
    max_length: int | None
    longer_hint: str = "raise `task.max_length`"
    unit: str = "token"
    length_limit: str = ""
    length_name: str = ""
    splits: dict[str, SplitFindings] = field(default_factory=dict)
    overlap: dict[str, dict[str, Overlap]] = field(default_factory=dict)

    def added_to(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the data section of a report with the findings; what it says already stays."""
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
        """Return the findings of a split by the keys of a report, which name what is counted."""
        known: dict[str, Any] = _known(asdict(split))
        if (lengths := known.pop("lengths", None)) is not None:
            known[f"{self.unit}s"] = lengths
            known[f"unknown_{self.unit}s"] = known["unknown_share"]
        del known["unknown_share"]
        return known

    def problems(self) -> list[Problem]:
        """Return the overlaps of held-out rows with train that are above `max_overlap`."""
        limit = self.recipe.data.check.max_overlap
        problems = []
        for name, others in self.overlap.items():
            if "train" not in others:
                continue
            mixed = self.splits[name].sets
            parts = [
                (found, mixed[one], f"{name} rows of the set `{one}`", f"data.mix.{one}.{name}")
                for one, found in others["train"].of_sets.items()
            ] or [
                (others["train"].exact, self.splits[name].rows, f"{name} rows", f"data.{name}"),
            ]
            problems += [
                self._leak(found, of, rows, key)
                for found, of, rows, key in parts
                if found.share > limit
            ]
        return problems

    def _leak(self, exact: Found, of: int, rows: str, key: str) -> Problem:
        """Return the problem of held-out rows that are trained too."""
        limit = self.recipe.data.check.max_overlap
        places = ", ".join(f"{e.row} (`{e.text}`) is {e.other}" for e in exact.examples)
        return Problem(
            f"{exact.rows:,} of {of:,} {rows}"
            f"{_percent(exact.share)} also occur in train, and `max_overlap` allows "
            f"{100 * limit:g} %: {places}",
            self.recipe.at(key),
            "draw the rows from train, `{from: train, fraction: 0.1, disjoint: exact}`, "
            "remove them from one side, or, if this is meant, allow it with "
            f"`--set data.check.max_overlap={_allowing(exact.share):g}`",
        )

    def warnings(self) -> list[str]:
        """Return what is not forbidden but should be looked at, a line each."""
        # once: the other splits are written in the same language
        unknown = (split.unknown_warning for split in self.splits.values())
        lines = list(filter(None, unknown))[:1]
        for name, split in self.splits.items():
            if split.rows_without_example:
                share = _percent(split.rows_without_example / split.rows)
                truncate = getattr(self.recipe.task, "truncate", None)
                ways = self.longer_hint
                if truncate == "right":
                    ways += ", or cut the beginning instead: `task.truncate: left`"
                lines.append(
                    f"{split.rows_without_example:,} of {split.rows:,}{share} {name} rows leave "
                    f"nothing to train within {self.length_limit}, and are left out: {ways}"
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
            for found, how in (
                (split.duplicates, "equal to"),
                (split.near_duplicates, "nearly equal to"),
            ):
                if found and found.rows:
                    are = _verb(found.rows, "are")
                    lines.append(f"{found} {name} {are} {how} an earlier one: {_first(found)}")
        for name, others in self.overlap.items():
            for other, what in others.items():
                for found, how in ((what.exact, "equal to"), (what.near, "nearly equal to")):
                    if found and found.rows:
                        are = _verb(found.rows, "are")
                        lines.append(
                            f"{found} {name} {are} {how} a row of {other}: {_first(found)}"
                        )
        return lines

    def table(self) -> str:
        """Return the findings as aligned columns, one for each split, with the warnings below."""
        rows: list[tuple[str, list[str]]] = [("data", list(self.splits))]
        splits = list(self.splits.values())

        def add(name: str, values: list[str], always: bool = False) -> None:
            if always or any(value not in ("", "0") for value in values):
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
            add(f"cut at {self.length_name}", cut, always=True)
        add(f"divided at {self.length_name}", divided if has_divided else [])
        if any(s.unknown_warning for s in splits):
            add("unknown tokens", [f"{100 * s.unknown_share:.1f} %" for s in splits])
        trained = [s.trained_tokens for s in splits]
        add(
            "trained tokens", ["" if share is None else f"{100 * share:.1f} %" for share in trained]
        )
        rows += _label_rows(splits)
        add("duplicates", [str(s.duplicates) for s in splits], always=True)
        add("near duplicates", [_shown(s.near_duplicates) for s in splits])
        add("contradictions", [_shown(s.contradictions) for s in splits])
        for other in self.splits:
            overlaps = [self.overlap.get(name, {}).get(other) for name in self.splits]
            if any(overlaps):
                add(
                    f"also in {other}",
                    [_shown(o.exact if o else None) for o in overlaps],
                    always=True,
                )
                add(f"nearly in {other}", [_shown(o.near if o else None) for o in overlaps])
        lines = _aligned(rows)
        warnings = [f"warning: {line}" for line in self.warnings()]
        if self.recipe.data.streaming:
            lines.append("train is streamed: its rows were not inspected for duplicates or overlap")
        room = max(25 - len(lines), 4)
        if len(warnings) > room:
            more = len(warnings) - room + 1
            warnings = [*warnings[: room - 1], f"({more} more warnings; report.json has them all)"]
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
    # what is written as a code is wider than it was, so that comes first
    return aligned([[printable(cell) for cell in (name, *values)] for name, values in rows])


def _shown(found: Found | None) -> str:
    return "" if found is None else str(found)


def _quantiles(lengths: dict[str, int]) -> str:
    return "/".join(str(lengths[key]) for key in ("p50", "p95", "max"))


def _percent(share: float) -> str:
    if not share:
        return ""
    return " (<0.1 %)" if share < 0.0005 else f" ({100 * share:.1f} %)"


def _allowing(share: float) -> float:
    """Return a limit of two digits that a share is not above."""
    return min(float(np.ceil(share * 100) / 100), 1.0)


def short(text: str, width: int = TEXT_WIDTH) -> str:
    """Return a text in one line of at most `width` columns."""
    return shortened(" ".join(text.split()), width)


def _verb(count: int, verb: str) -> str:
    """Return `row` or `rows` with the verb that belongs to so many: `row is`, `rows are`."""
    one = {"are": "is", "have": "has"}
    return f"row {one[verb]}" if count == 1 else f"rows {verb}"


def _first(found: Found) -> str:
    first = found.examples[0]
    return f"{first.row} `{first.text}` and {first.other}"


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts without what is not known, and without sets where none are mixed."""
    of_sets = ("of_sets", "sets", "shares")
    return {
        k: _without_none(v) for k, v in facts.items() if v is not None and (v or k not in of_sets)
    }


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
