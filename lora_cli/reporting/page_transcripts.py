"""The part of the page about transcripts: wrong words, and recordings to listen to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_cli.errors import counted
from lora_cli.reporting.page_analysis import Line, Word, word_errors, words_of, worst
from lora_cli.reporting.page_elements import DASH, esc, own, section, table

CASES, WORDS = 20, 15
KINDS = ("substituted", "deleted", "inserted")


def transcript_sections(lines: Sequence[Line], split: str) -> list[str]:
    """Return the sections on the transcripts of a split's rows."""
    rows = counted(len(lines), f"{split} row")
    wrong = [line for line in worst("transcript", lines, len(lines)) if word_errors(line)]
    shown = f"The {CASES} of {len(wrong):,}" if len(wrong) > CASES else f"The {len(wrong):,}"
    note = (
        f"{shown} recordings (of {rows}) with most wrong words, the worst first; words as the "
        "metrics compare them. Wrong words are orange: on the left what was said, on the right "
        "what was written. Listen: it may be the text that is wrong."
    )
    inner = "".join(map(_case, wrong[:CASES]))
    return [
        _words(lines, rows),
        section(
            "errors", "Worst recordings", note, f'<ol class="cases">{inner}</ol>' * bool(wrong)
        ),
    ]


def _words(lines: Sequence[Line], rows: str) -> str:
    """Return how many words are wrong and how, and the words that are wrong most often."""
    pairs = [pair for line in lines for pair in words_of(line)]
    if not pairs:
        return ""
    found: dict[str, Counter[Word]] = {kind: Counter() for kind in KINDS}
    for wanted, said in pairs:
        if wanted != said:
            kind = "inserted" if wanted is None else "deleted" if said is None else "substituted"
            found[kind][wanted, said] += 1
    total = sum(wanted is not None for wanted, _ in pairs)
    cells = [
        [kind, f"{n:,}", f"{n / total:.3f}" if total else DASH, f"{len(found[kind]):,}"]
        for kind in KINDS
        for n in [found[kind].total()]
    ]
    note = f"The {total:,} words of {rows}, beside those that the model wrote. A rate is the share "
    note += "of the words that were said; the three together are the word error rate."
    overview = table(["words", "number", "rate", "different ones"], cells, "Wrong words")
    common = [
        [kind, _word(wanted), _word(said), f"{count:,}"]
        for kind in KINDS
        for (wanted, said), count in found[kind].most_common(WORDS)
    ]
    header = ["", "said", "written", "times"]
    listed = table(header, common, "Most common errors", texts=3) if common else ""
    heading = "<h3>Most common errors</h3>" if common else ""
    return section("words", "Words", note, overview, heading, listed)


def _word(word: str | None) -> str:
    return DASH if word is None else own(word)


def _case(line: Line) -> str:
    """Return a recording with its reference, its transcript, and a player if it is small."""
    pairs = words_of(line)
    errors, total = word_errors(line), sum(wanted is not None for wanted, _ in pairs)
    head = f"<span><b>{errors}</b> wrong of {counted(total, 'word')}</span>"
    place = f'<span class="place">{own(line["place"])}</span>' if "place" in line else ""
    sides = (("said", 0), ("written", 1))
    both = "".join(
        f'<div><i>{name}</i><span class="text">{_marked(pairs, side)}</span></div>'
        for name, side in sides
    )
    sound = line.get("picture")
    sound = f'<audio controls preload="none" src="{esc(sound)}"></audio>' if sound else ""
    name = own(line["text"], "span", "text") if line.get("text") else ""
    return (
        f'<li><div class="head">{head}{place}</div>{name}{sound}<div class="pair">{both}</div></li>'
    )


def _marked(pairs: Sequence[Word], side: int) -> str:
    """Return the words of one side as markup, the wrong ones marked."""
    words = []
    for pair in pairs:
        if (word := pair[side]) is not None:
            is_right = pair[0] == pair[1]
            words.append(own(word) if is_right else f'<mark class="wrong">{own(word)}</mark>')
    return " ".join(words) or "(nothing)"
