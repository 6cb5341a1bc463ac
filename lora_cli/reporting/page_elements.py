"""Building blocks of the page: escaping, tables, and the style sheet."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

# what is no character of an HTML text: controls, halves of surrogate pairs, noncharacters
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

DASH = "-"  # what is not known


def esc(value: Any) -> str:
    """Return a value escaped for HTML, also within the quotes of an attribute."""
    return html.escape(_UNFIT.sub("\ufffd", str(value)), quote=True)


def own(value: Any, tag: str = "span", more: str = "") -> str:
    """Return a text of the data, with its own writing direction."""
    return f'<{tag} dir="auto" class="own {more}">{esc(value)}</{tag}>'


def named(value: Any) -> str:
    """Return a label that may be wrapped after its underscores."""
    return own(value).replace("_", "_<wbr>")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], name: str, texts: int = 1) -> str:
    """Return a table whose cells are HTML; the first `texts` columns are set left, others right."""
    head = "".join(f'<th scope="col"{_left(i, texts)}>{cell}</th>' for i, cell in enumerate(header))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{_left(i, texts)}>{cell}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return scroller(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", name)


def grouped_table(
    corner: str,
    groups: Sequence[tuple[str, Sequence[str]]],
    rows: Iterable[Sequence[str]],
    name: str,
    strong: str = "",
) -> str:
    """Return a table whose columns are in named groups.

    Args:
        corner: Name of the first column.
        groups: Names of the groups and of their columns.
        rows: Cells, which are HTML.
        name: Of the table.
        strong: The columns of this name stand out.
    """
    above = "".join(
        f'<th scope="colgroup" colspan="{len(names)}" class="group">{esc(group)}</th>'
        for group, names in groups
    )
    columns = [(n, i == 0) for _, names in groups for i, n in enumerate(names)]
    looks = [
        " ".join(["first"] * first + ["strong"] * (column == strong)) for column, first in columns
    ]
    looks = [f' class="{look}"' if look else "" for look in looks]
    below = "".join(
        f'<th scope="col"{look}>{esc(n)}</th>' for (n, _), look in zip(columns, looks, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{x}>{cell}</td>" for cell, x in zip(row[1:], looks, strict=True))
        + "</tr>"
        for row in rows
    )
    head = f'<tr><th scope="col" rowspan="2" class="left">{esc(corner)}</th>{above}</tr>'
    head += f"<tr>{below}</tr>"
    return scroller(
        f'<table class="pinned"><thead>{head}</thead><tbody>{body}</tbody></table>', name
    )


def scroller(inner: str, name: str) -> str:
    """Return a box that scrolls content that is too wide, also by the keyboard."""
    return f'<div class="scroll" role="region" aria-label="{esc(name)}" tabindex="0">{inner}</div>'


def _left(i: int, texts: int) -> str:
    return ' class="left"' if i < texts else ""


def section(anchor: str, title: str, note: str, *parts: str) -> str:
    """Return a section of the page, or nothing if its parts are empty; `note` is HTML."""
    inner = "".join(parts)
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{anchor}"><h2>{esc(title)}</h2>{note}{inner}</section>' if inner else ""


def share_bar(share: float | None) -> str:
    """Return a share with a bar of its length."""
    if share is None:
        return DASH
    bar = f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
    return f"{share:.3f}{bar}"


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Return names and values, without unknown values."""
    rows = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{own(value)}</dd></div>"
        for name, value in pairs
        if value not in (None, "")
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def document(title: str, body: str) -> str:
    """Return the whole page; it may load nothing and run nothing, whatever stands in its texts."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n"
        "</html>\n"
    )


# The two hues of the plots differ in lightness too, so they hold without colour vision.
STYLE = """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#1c242c;--muted:#5b6672;
--rule:#e2e5e8;--soft:#f1f3f4;--blue:#2563a8;--orange:#b9481b;--good:#1d6f42;--poor:#a3361f;
--hit:37 99 168;--miss:185 72 27;--on-heat:#000;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14181c;--card:#1a1f25;--ink:#e6e9ec;
--muted:#9ba7b3;--rule:#2e363e;--soft:#20262d;--blue:#6fabec;--orange:#f08a55;--good:#6cc493;
--poor:#f09080;--hit:58 120 190;--miss:176 78 36;--on-heat:#fff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans)}
main{max-width:66rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.5rem,1.1rem + 1.8vw,2.2rem);line-height:1.2;margin:.2rem 0 .6rem;
letter-spacing:-.015em;overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:1.25rem;margin:0 0 .35rem;letter-spacing:-.005em}
h3{font-size:.95rem;margin:0 0 .3rem;font-weight:600}
p{margin:.4rem 0}
a{color:var(--blue)}
code,.mono{font-family:var(--mono);font-size:.86em;overflow-wrap:anywhere}
.over{color:var(--muted);font-size:.85rem;letter-spacing:.02em}
.lead{color:var(--muted);max-width:48rem;overflow-wrap:anywhere}
.verdict{border-left:4px solid var(--muted);background:var(--card);padding:.9rem 1.1rem;
margin:1.4rem 0 .6rem;font-size:1.1rem;line-height:1.45;border-radius:0 6px 6px 0;
overflow-wrap:anywhere}
.verdict.good{border-color:var(--good)}.verdict.poor{border-color:var(--poor)}
.verdict+.verdict{font-size:1rem;margin-top:.6rem}
.verdict.caution{border-color:var(--orange)}
.verdict strong{font-weight:650}.good strong{color:var(--good)}.poor strong{color:var(--poor)}
.caution strong{color:var(--orange)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1px;
margin:1.4rem 0;background:var(--rule);border:1px solid var(--rule);border-radius:8px;
overflow:hidden}
.tiles div{background:var(--card);padding:.8rem 1rem}
.tiles b{display:block;font-size:1.45rem;line-height:1.25;font-weight:600;
font-variant-numeric:tabular-nums}
.tiles span{display:block;color:var(--muted);font-size:.82rem;line-height:1.35}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.9rem;padding:.6rem 0;
border-bottom:1px solid var(--rule)}
nav a{text-decoration:none;padding:.15rem 0}nav a:hover{text-decoration:underline}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--blue);
outline-offset:2px;border-radius:3px}
section{margin-top:2.8rem;scroll-margin-top:1rem}
.note{color:var(--muted);font-size:.92rem;max-width:46rem;margin:.1rem 0 .9rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;
padding:.9rem .9rem .5rem;min-width:0}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem 1rem;
font-size:.82rem;color:var(--muted);margin-bottom:.4rem}
figcaption b{color:var(--ink);font-size:.95rem}
.key{white-space:nowrap;margin-left:.8rem}
.key i{display:inline-block;width:1.1rem;height:3px;border-radius:2px;margin-right:.35rem;
vertical-align:.22em}
.key .dash{height:2px;background:repeating-linear-gradient(90deg,var(--muted) 0 4px,transparent 4px
7px)}
svg{display:block;width:100%;height:auto;font-family:var(--sans)}
svg text{fill:var(--muted);font-size:12.5px;font-variant-numeric:tabular-nums}
svg .warned{fill:var(--orange);font-weight:600}
svg .shade{fill:var(--orange);opacity:.1}
svg .rule{stroke:var(--rule);stroke-width:1;fill:none}
svg .base{stroke:var(--muted);stroke-width:1.4;stroke-dasharray:5 4;fill:none}
svg .mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3;fill:none}
svg .line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
svg .raw{stroke-width:1;opacity:.35}
svg .blue{stroke:var(--blue)}svg .orange{stroke:var(--orange)}
svg .dot{stroke:var(--card);stroke-width:1.5}
svg .dot.blue{fill:var(--blue)}svg .dot.orange{fill:var(--orange)}
svg .soft{fill:var(--blue);opacity:.22;stroke:none}
svg.heat{width:auto;max-width:none;margin:0 auto}svg.heat text{font-size:10.5px;fill:var(--ink)}
svg .paper{fill:var(--soft)}
svg .hit{fill:rgb(var(--hit)/var(--v))}svg .miss{fill:rgb(var(--miss)/var(--v))}
.bg-blue{background:var(--blue)}.bg-orange{background:var(--orange)}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;background:var(--card);
max-width:100%}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .8rem;text-align:right;border-bottom:1px solid var(--rule);
white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
thead th{font-weight:600;color:var(--muted);font-size:.82rem;background:var(--soft)}
tbody th{font-weight:500;text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:10rem;
max-width:24rem}.pinned tbody th{min-width:6rem}
th.left,td.left{text-align:left}
.pinned tbody th,.pinned th.left{position:sticky;left:0;background:var(--card)}
.pinned th.left{background:var(--soft)}
th.group{text-align:center;color:var(--ink)}
.first,.group{border-left:1px solid var(--rule)}
td.strong{font-weight:650}
.bar{display:inline-block;width:4.2rem;height:.5rem;border-radius:3px;background:var(--soft);
margin-left:.6rem;vertical-align:.06em;overflow:hidden}
.bar i{display:block;height:100%;background:var(--blue)}
.matrix{width:auto;font-size:.84rem;margin:0 auto}
.matrix td{text-align:center;min-width:2.4rem;padding:.34rem .3rem;border:1px solid var(--card);
background:rgb(var(--miss)/var(--v,0));color:var(--on-heat)}
.matrix td.hi{color:#fff}
.matrix td.hit{background:rgb(var(--hit)/var(--v));font-weight:650}
.matrix td:empty{background:var(--soft)}
.matrix thead th{vertical-align:bottom;text-align:center;padding:.6rem .2rem;font-weight:500;
color:var(--ink);background:none}
.matrix thead th span{writing-mode:vertical-rl;text-orientation:sideways;transform:rotate(180deg);
max-height:9.5rem;overflow:hidden;text-overflow:ellipsis;text-align:left}
.matrix tbody th{position:sticky;left:0;background:var(--card);max-width:12rem;min-width:0;
overflow:hidden;text-overflow:ellipsis;white-space:nowrap;border-bottom:0}
.matrix td.corner{color:var(--muted);background:none;font-size:.78rem;text-align:left;
line-height:1.3;vertical-align:bottom;padding:.6rem .8rem}
ol.cases .thumb{float:right;max-width:96px;max-height:96px;margin:0 0 .3rem .8rem;border-radius:4px}
table.drawn td,table.drawn th{padding:.4rem;text-align:center}
table.drawn img{display:block;max-width:192px;border-radius:4px;margin:0 auto}
svg.boxed{float:right;width:min(100%,24rem);max-height:24rem;margin:0 0 .4rem 1rem}
svg.boxed rect{fill:none;stroke-width:2.5;vector-effect:non-scaling-stroke}
svg.boxed .wanted{stroke:#3d8bdd}svg.boxed .found{stroke:#f07a35;stroke-dasharray:6 4}
ol.cases>li::after{content:"";display:block;clear:both}
ol.cases audio{display:block;width:100%;max-width:24rem;height:2.2rem;margin:.5rem 0 0}
ol.cases{list-style:none;margin:0;padding:0;display:grid;gap:.7rem}
ol.cases>li{background:var(--card);border:1px solid var(--rule);border-radius:8px;
padding:.75rem 1rem;break-inside:avoid;min-width:0}
.head{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;align-items:baseline;font-size:.88rem;
color:var(--muted)}
.head b{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
.head .place{margin-left:auto;font-size:.8rem}
.own{unicode-bidi:isolate}
.text{display:block;white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0 0;
text-align:start}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));
gap:.4rem 1.4rem;margin-top:.6rem;padding-top:.6rem;border-top:1px solid var(--rule)}
.pair i{color:var(--muted);font-style:normal;font-size:.82rem}
.pair .text{margin-top:.1rem;font-size:.93rem}
mark.entity{color:inherit;background:rgb(var(--hit)/.16);border-bottom:2px solid var(--blue);
padding:0 .15em;border-radius:2px}
mark.wrong{background:rgb(var(--miss)/.16);border-color:var(--orange)}
mark small{color:var(--muted);font-size:.72em;margin-left:.35em}
h3{margin-top:1.3rem}
.plain{padding-left:1.1rem;font-size:.92rem;margin:.8rem 0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));
gap:0 2rem;margin:0}
.facts div{display:flex;justify-content:space-between;gap:1rem;padding:.3rem 0;
border-bottom:1px solid var(--rule);font-size:.9rem;min-width:0}
.facts dt{color:var(--muted);flex:none;max-width:65%;overflow-wrap:anywhere}
.facts dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
details{margin-top:.8rem}summary{cursor:pointer;color:var(--blue);font-size:.92rem}
pre{background:var(--soft);border-radius:8px;padding:.8rem 1rem;overflow-x:auto;margin:.6rem 0;
font:.84rem/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:3rem;padding-top:1rem;border-top:1px solid var(--rule);color:var(--muted);
font-size:.85rem}
@media (max-width:36rem){main{padding:1.4rem .9rem 3rem}th,td{padding:.4rem .55rem}
.verdict{font-size:1.02rem}svg text{font-size:15px}.head .place{margin-left:0}nav a{padding:.4rem 0}
.matrix tbody th{max-width:7.5rem}section{margin-top:2.2rem}}
@media print{:root{--paper:#fff;--soft:#f4f4f4}body{font-size:10.5pt}main{max-width:none;
padding:0}nav{display:none}.grid{grid-template-columns:1fr 1fr}figure,tr,.verdict,.tiles
{break-inside:avoid}h2,h3,.note{break-after:avoid}section{margin-top:1.6rem}.scroll{overflow:visible}
svg.heat{max-width:100%;height:auto}table{font-size:.82rem}th,td{padding:.3rem .5rem}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
