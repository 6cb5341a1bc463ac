"""The verdict on a run in a sentence: is it better than before, and than a constant answer?

No more is said than the rows carry. A difference counts where the 95 % interval of what was
measured leaves no doubt of its sign; otherwise the sentence says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_cli.errors import counted
from lora_cli.reporting.page_analysis import (
    SMALLER_IS_BETTER,
    Line,
    constant_error,
    finite,
    interval,
    majority,
)
from lora_cli.reporting.report import part, shown_number

SHARES = {"accuracy", "accuracy_at_1", "exact_match", "no_answer", "f1", "precision", "recall"}
OF_ANSWERS = {"exact_match", "no_answer", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum",
              "wer", "cer"}  # fmt: skip
CORRELATIONS = {"pearson", "spearman", "matthews_correlation"}
ENOUGH_ROWS = 30  # of a metric whose interval is not known
MANY_TIMES = 10  # a change by more than so many times the number itself
MANY_ROWS = 100  # with so many, it is not for want of rows that a difference is unclear


def main_metric(report: dict[str, Any], split: str) -> tuple[str, bool]:
    """Return the main metric of the page, and whether lower values are better."""
    best, after = part(report, "best"), part(report, "metrics", "after", split)
    name = str(best.get("metric") or next((k for k in after if k != "loss"), "loss"))
    if name not in after:
        name = "loss"
    known = best.get("mode") if name == best.get("metric") else None
    return name, known == "min" if known else name.rpartition("/")[2] in SMALLER_IS_BETTER


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run, in words."""

    tone: Literal["good", "poor", "unknown"]
    head: str
    text: str


def verdict(
    report: dict[str, Any], split: str, numbers: Sequence[Line] = (), lines: Sequence[Line] = ()
) -> Verdict:
    """Return the verdict: whether the model is better than before and than a constant answer.

    Args:
        report: The report.
        split: The split it is judged by.
        numbers: The split's predictions, of a regression.
        lines: The split's predictions, of any task: the losses of the rows.
    """
    name, down = main_metric(report, split)
    before, after = (
        finite(part(report, "metrics", when, split).get(name)) for when in ("before", "after")
    )
    if after is None:
        hint = "Hold some out: `data.validation: {fraction: 0.1}`."
        unknown = f"No rows were held out, so how well it works is not known. {hint}"
        return Verdict("unknown", "Not measured.", unknown)
    of_set, _, measured = name.rpartition("/")
    rows = measured_rows(report, split, name)
    where = f"{split} row of the set {of_set}" if of_set else f"{split} row"
    if of_set:  # the rows of a set alone
        lines = [line for line in lines if line.get("set") == of_set]
    text, poor = _against_before(name, down, before, after, where, rows)
    base = majority(report, split) if name == "accuracy" else None
    if base is not None:
        low, high = interval(after, rows or 1)
        which = f"always saying “{base[0]}” ({shown_number(base[1])})"
        gap = f"{abs(after - base[1]) * 100:.1f} points"
        if low > base[1]:
            text += f", {gap} above {which}"
        elif high < base[1]:
            poor = poor or "It is worse than no model."
            text += f", {gap} below {which}"
        else:
            poor = poor or "It learned next to nothing."
            text += f", no clear gain over {which}"
    error, mean = (
        finite(part(report, "metrics", "after", split).get("mse")),
        constant_error(numbers),
    )
    if error is not None and mean is not None and error >= mean:
        poor = poor or "It learned next to nothing."
        text += f"; its mean squared error ({shown_number(error)}) is no smaller than that of "
        text += f"always saying the mean ({shown_number(mean)})"
    if before is None and base is None and not poor:  # there is nothing to compare it with
        return Verdict("unknown", "Measured.", f"{text}.")
    if not is_clear(measured, before, after, rows, lines):
        if rows < MANY_ROWS:
            few = f"{counted(rows, 'row')} {'is' if rows == 1 else 'are'} too few"
            text += f": {few} to tell this from chance"
            return Verdict("unknown", "Too few rows to tell.", f"{text}.")
        if before != after:
            poor = poor or "No clear change."
            text += ": so small a difference may be chance"
    head = poor or ("It learned." if before is not None else "Measured.")
    return Verdict("poor" if poor else "good", head, f"{text}.")


def _against_before(
    name: str, down: bool, before: float | None, after: float, row: str, rows: int
) -> tuple[str, str]:
    """Return the comparison with the model before training, and a weakness if there is one.

    Args:
        name: The metric.
        down: Whether less of it is better.
        before: Its value before training.
        after: Its value after it.
        row: What one of the rows is called.
        rows: How many there are, if that is known.
    """
    where = f"On {_counted_rows(rows, row)}" if rows else f"On {row.partition(' ')[0]}"
    shown = name.rpartition("/")[2].replace("_", " ")
    if before is None:
        return f"{where}, {shown} is {shown_number(after)} (not measured before training)", ""
    if before == after:
        text = f"{where}, {shown} stays {shown_number(after)}, as before training"
        return text, "It did not learn."
    verb = "falls" if after < before else "rises"
    text = f"{where}, {shown} {verb} from {shown_number(before)} before training to "
    text += f"{shown_number(after)} ({_change(down, before, after)})"
    return text, "" if (after < before) == down else "It got worse."


def _counted_rows(rows: int, row: str) -> str:
    """Return `the 20 test rows`; `the 20 test rows of the set math`."""
    noun, of, name = row.partition(" of ")
    return f"the {counted(rows, noun)}{of}{name}"


def measured_rows(report: dict[str, Any], split: str, metric: str = "") -> int:
    """Return the number of measured rows of a split, without those that had nothing to measure.

    Args:
        report: The report.
        split: Of which split.
        metric: By which metric: of a set's rows alone, or of those that were answered.
    """
    facts, (of_set, _, name) = part(report, "data", split), metric.rpartition("/")
    rows, empty = (finite(facts.get(key)) or 0.0 for key in ("rows", "rows_without_example"))
    if of_set:
        rows, empty = finite(part(facts, "sets", of_set).get("rows")) or 0.0, 0.0
    answered = finite(part(facts, "sets", of_set).get("answered_rows")) if of_set else None
    answered = finite(facts.get("answered_rows")) if not of_set else answered
    if answered is not None and name in OF_ANSWERS:
        return int(min(answered, rows - empty))
    return int(rows - empty)


def is_clear(
    name: str, before: float | None, after: float | None, rows: int, lines: Sequence[Line]
) -> bool:
    """Return whether the rows suffice to say that a metric has changed, or has not.

    Of shares, Newcombe's interval of the difference of two (1998, method 10) and Fisher's exact
    test, which holds for few rows too; of correlations, Fisher's interval; of means over rows,
    Student's. What was measured before is taken for another sample of as many rows, since its rows
    are not kept: that is on the safe side.
    """
    if before is None or after is None or before == after:
        return rows >= ENOUGH_ROWS
    difference = abs(after - before)
    if name in SHARES and min(before, after) >= 0 and max(before, after) <= 1:
        if rows < 1:
            return False
        return _are_apart(before, after, rows)
    if name in CORRELATIONS:
        if rows <= 3:
            return False
        first, second = (math.atanh(max(-0.999999, min(0.999999, r))) for r in (before, after))
        return abs(second - first) > 1.959964 * math.sqrt(2 / (rows - 3))
    values = _of_rows(name, lines)
    if values is None:
        return rows >= ENOUGH_ROWS
    if name == "perplexity":  # the losses of the rows are its logarithms
        difference = abs(math.log(after / before)) if min(before, after) > 0 else 0.0
    return difference > math.sqrt(2) * _half_width(values)


def _are_apart(one: float, other: float, rows: int) -> bool:
    """Return whether two shares of the same number of rows differ significantly."""
    from scipy.stats import fisher_exact

    low, high = sorted((one, other))
    below, above = high - interval(high, rows)[0], interval(low, rows)[1] - low
    if high - low <= math.hypot(below, above):
        return False
    hits = [round(share * rows) for share in (low, high)]
    return float(fisher_exact([[n, rows - n] for n in hits]).pvalue) < 0.05


def _of_rows(name: str, lines: Sequence[Line]) -> list[tuple[float, float]] | None:
    """Return the sum and the number of items of each row, whose overall mean is the metric."""
    rows: dict[Any, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for line in lines:
        loss, items = finite(line.get("loss")), finite(line.get("n_items"))
        if name == "mse":
            wanted, said = finite(line.get("reference")), finite(line.get("prediction"))
            loss = None if wanted is None or said is None else (wanted - said) ** 2
            items = 1.0
        if loss is not None and items:
            total, count = rows[line.get("row")]
            rows[line.get("row")] = (total + loss, count + items)
    if name not in ("loss", "perplexity", "mse") or not rows:
        return None
    return list(rows.values())


def _half_width(rows: Sequence[tuple[float, float]]) -> float:
    """Return the half-width of the 95 % interval of a mean over items, from rows' differences."""
    from scipy.stats import t

    n, items = len(rows), sum(count for _, count in rows)
    if n < 2:
        return math.inf
    mean = sum(total for total, _ in rows) / items
    squares = sum((total - mean * count) ** 2 for total, count in rows)
    return float(t.ppf(0.975, n - 1)) * math.sqrt(squares * n / (n - 1)) / items


def _change(down: bool, before: float, after: float) -> str:
    """Return the change of a share in points, or of another value, such as an error, in percent."""
    if not down and max(abs(before), abs(after)) <= 1:
        share = min(before, after) >= 0
        text = f"{(after - before) * 100:+.1f} points" if share else f"{after - before:+.4f}"
    elif abs(after - before) > MANY_TIMES * abs(before):  # such a percentage says nothing
        text = f"{after - before:+.4g}" if before else "from zero"
    else:
        text = f"{100 * (after - before) / abs(before):+.0f} %"
    return text.replace("-", "\N{MINUS SIGN}")
