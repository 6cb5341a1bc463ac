"""The part of the page about entities: the scores of each type, and the worst sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lora_cli.errors import counted
from lora_cli.reporting.page_analysis import LabelScore, Line, finite
from lora_cli.reporting.page_elements import DASH, esc, named, own, section, share_bar, table

CASES = 20
Place = tuple[int, int, str]  # first character, the one after the last, and the type


def entity_sections(lines: Sequence[Line], split: str) -> list[str]:
    """Return the sections on the entities of a split's rows."""
    rows = counted(len(lines), f"{split} row")
    wrong = [line for line in lines if places(line, "reference") != places(line, "prediction")]
    wrong.sort(key=lambda line: -(finite(line.get("loss")) or 0.0))
    shown = f"The {CASES} of {len(wrong):,}" if len(wrong) > CASES else f"The {len(wrong):,}"
    note = (
        f"{shown} rows (of {rows}) with an error that cost most loss, the worst first. What is "
        "wrong is orange: on the left what was not found so, on the right what is not so in the "
        "data. Where the model is right, the annotation is not."
    )
    cases = "".join(map(_case, wrong[:CASES]))
    inner = f'<ol class="cases">{cases}</ol>' if cases else ""
    return [_types(lines, rows), section("errors", "Worst rows", note, inner)]


def places(line: Line, key: str) -> set[Place]:
    """Return the entities of a line, as its reference or its prediction has them."""
    found = set()
    value = line.get(key)
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            start, end, label = (item.get(name) for name in ("start", "end", "label"))
            if isinstance(start, int) and isinstance(end, int):
                found.add((start, end, str(label)))
    return found


def per_type(lines: Iterable[Line]) -> list[LabelScore]:
    """Return precision, recall and F1 of each type; an entity is right if place and type are."""
    wanted: Counter[str] = Counter()
    said: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for line in lines:
        here, found = places(line, "reference"), places(line, "prediction")
        wanted.update(label for *_, label in here)
        said.update(label for *_, label in found)
        right.update(label for *_, label in here & found)
    return [
        LabelScore(
            name,
            wanted[name],
            said[name],
            right[name] / said[name] if said[name] else None,
            right[name] / wanted[name] if wanted[name] else None,
            2 * right[name] / (wanted[name] + said[name]),
        )
        for name in sorted(wanted.keys() | said.keys())
    ]


def _types(lines: Sequence[Line], rows: str) -> str:
    note = (
        f"Entities of {rows}. Precision: of those that were found, the share that are right, in "
        "their first and last word and in their type. Recall: of those in the data, the share "
        "found so. F1: the harmonic mean of both."
    )
    cells = [
        [
            named(score.label),
            *(f"{v:.3f}" if v is not None else DASH for v in (score.precision, score.recall)),
            share_bar(score.f1),
            f"{score.rows:,}",
            f"{score.called:,}",
        ]
        for score in per_type(lines)
    ]
    header = ["type", "precision", "recall", "F1", "in the data", "found"]
    inner = table(header, cells, "By type") if cells else ""
    return section("labels", "By type of entity", note, inner)


def _case(line: Line) -> str:
    wanted, said = places(line, "reference"), places(line, "prediction")
    missed, extra = len(wanted - said), len(said - wanted)
    parts = [f"<b>{missed}</b> not found" if missed else "", f"<b>{extra}</b> not in the data"]
    head = "".join(f"<span>{part}</span>" for part in [parts[0], parts[1] if extra else ""] if part)
    place = f'<span class="place">{own(line["place"])}</span>' if "place" in line else ""
    text = str(line.get("text") or "")
    both = "".join(
        f'<div><i>{name}</i><span class="text">{_marked(text, these, others)}</span></div>'
        for name, these, others in (("in the data", wanted, said), ("found", said, wanted))
    )
    return f'<li><div class="head">{head}{place}</div><div class="pair">{both}</div></li>'


def _marked(text: str, these: set[Place], others: set[Place]) -> str:
    """Return a text as markup with its entities; those that the other side lacks are marked wrong.

    Of a text that was cut, what lies behind the cut is counted.
    """
    parts, at, beyond = [], 0, 0
    for start, end, label in sorted(these):
        if end > len(text) or start < at:
            beyond += 1
            continue
        look = "entity" if (start, end, label) in others else "entity wrong"
        parts.append(own(text[at:start], "span"))
        parts.append(
            f'<mark class="{look}">{own(text[start:end])}<small>{esc(label)}</small></mark>'
        )
        at = end
    parts.append(own(text[at:], "span"))
    more = f" <i>({counted(beyond, 'more')} behind the end)</i>" if beyond else ""
    return "".join(parts) + more
