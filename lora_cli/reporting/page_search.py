"""The part of the page about search: the ranks of the right texts, and the worst rows."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.errors import counted
from lora_cli.reporting.page_analysis import Line, finite
from lora_cli.reporting.page_elements import own, section, share_bar, table
from lora_cli.reporting.report import part

CASES = 20
BANDS = ((1, 1), (2, 3), (4, 10), (11, 30), (31, 100), (101, None))


def search_sections(lines: Sequence[Line], split: str) -> list[str]:
    """Return the sections about the search results of a split's anchors."""
    known = [(rank, line) for line in lines if (rank := rank_of(line)) is not None]
    rows = counted(len(known), f"{split} row")
    wrong = [(rank, line) for rank, line in known if rank > 1]
    wrong.sort(key=lambda pair: (-pair[0], -(finite(pair[1].get("loss")) or 0.0)))
    shown = f"The {CASES} of {len(wrong):,}" if len(wrong) > CASES else f"The {len(wrong):,}"
    note = (
        f"{shown} rows (of {rows}) whose right text is not the nearest, the farthest first. Where "
        "what was found answers as well, the rows are to blame: such texts are false negatives."
    )
    cases = "".join(_case(line, rank) for rank, line in wrong[:CASES])
    inner = f'<ol class="cases">{cases}</ol>' if cases else ""
    return [_ranks([rank for rank, _ in known], rows), section("errors", "Worst rows", note, inner)]


def rank_of(line: Line) -> int | None:
    """Return the rank at which a row's right text is found, if the line says it."""
    rank = finite(part(line, "scores").get("rank"))
    return None if rank is None or rank < 1 else int(rank)


def _ranks(ranks: Sequence[int], rows: str) -> str:
    note = f"At which place the right text is found, of {rows}; 1 is the nearest."
    cells = []
    for first, last in BANDS:
        count = sum(first <= rank and (last is None or rank <= last) for rank in ranks)
        name = f"{first} and more" if last is None else f"{first} to {last}"
        name = str(first) if first == last else name
        cells.append([name, f"{count:,}", share_bar(count / len(ranks) if ranks else None)])
    inner = table(["rank", "rows", "share"], cells, "Ranks") if ranks else ""
    return section("ranks", "Ranks", note, inner)


def _case(line: Line, rank: int) -> str:
    scores = part(line, "scores")
    right, found = finite(scores.get("cosine")), finite(scores.get("nearest_cosine"))
    head = f"<span>rank <b>{rank:,}</b></span>"
    if right is not None and found is not None:
        head += f"<span>cosine {right:.3f}, of the nearest {found:.3f}</span>"
    place = f'<span class="place">{own(line["place"])}</span>' if "place" in line else ""
    text = own(line["text"], "span", "text") if line.get("text") else ""
    both = "".join(
        f"<div><i>{name}</i>{own(str(line[key]).strip(), 'span', 'text')}</div>"
        for name, key in (("wanted", "reference"), ("nearest", "prediction"))
        if line.get(key) is not None
    )
    return f'<li><div class="head">{head}{place}</div>{text}<div class="pair">{both}</div></li>'
