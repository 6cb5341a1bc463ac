"""Spans in the formats of annotation tools, and errors in them."""

from __future__ import annotations

from typing import Any

import pytest

from lora_cli.data.entity_spans import Span, read_spans, words_of

TEXT = "Ada met Ida."


@pytest.mark.parametrize(
    "spans",
    [
        [{"start": 8, "end": 11, "label": "PER"}, {"start": 0, "end": 4, "label": "PER"}],
        [[0, 3, "PER"], [8, 11, "PER"]],
        [{"id": 1, "start_offset": 0, "end_offset": 3, "label": "PER"},
         {"id": 2, "start_offset": 7, "end_offset": 11, "label": " PER"}],
        [{"start": 0, "end": 3, "text": "Ada", "labels": ["PER"]},
         {"value": {"start": 8, "end": 11, "text": "Ida", "labels": ["PER"]}}],
        [{"start": 0, "end": 3, "token_start": 0, "token_end": 0, "label": "PER"},
         {"start": 8, "end": 11, "entity_group": "PER"}],
        [{"start": 0, "end": 3, "entity": "Ada", "type": "PER"},
         {"start": 8, "end": 11, "entity": "PER", "value": "Ida"}],
    ],
)  # fmt: skip
def test_spans_are_read_as_tools_export_them(spans: list[Any]) -> None:
    assert read_spans(spans, TEXT) == [Span(0, 3, "PER"), Span(8, 11, "PER")]


@pytest.mark.parametrize(
    ("spans", "what"),
    [
        (None, "holds null, not a list"),
        ([3], "span 1 is a number, not start, end and label"),
        ([[0, 3]], "span 1 has 2 parts"),
        ([{"start": 0, "end": 3}], "span 1 has no label"),
        ([{"start": 0, "label": "X"}], "span 1 has no `end`"),
        ([{"start": 0.5, "end": 3, "label": "X"}], "no `start` that is a whole number"),
        ([[0, 3, "X"], [8, 13, "X"]], "span 2, 8 to 13 (`X`), is not inside the text"),
        ([[3, 3, "X"]], "is empty: an end is the place after the last character"),
        ([{"start": 0, "end": 2, "text": "Ada", "label": "X"}], "lacks its last character"),
        ([[-1, 3, "X"]], "is not inside"),
        ([[3, 4, "X"]], "holds nothing but spaces"),
        ([[4, 8, "X"], [0, 6, "Y"]], "two spans overlap: 0 to 6 (`Y`) and 4 to 7 (`X`)"),
        ([{"start": 0, "end": 3, "labels": ["X", "Y"]}], "span 1 has 2 labels"),
        ([{"start": 1, "end": 4, "text": "Ada", "label": "X"}], "`da` by its places, and `Ada`"),
    ],
)
def test_errors_in_spans_are_named(spans: Any, what: str) -> None:
    result = read_spans(spans, TEXT)
    assert isinstance(result, str)
    assert what in result


def test_raw_text_is_split_into_words() -> None:
    text = 'Ada\'s "e-mail" to @ida: 3.5 %, 東京へ行く。 (U.S.) ...'
    words = [text[start:end] for start, end in words_of(text)]
    shown = 'Ada\'s | " | e-mail | " | to | @ida | : | 3.5 | % | , | 東 | 京 | へ | 行 | く | 。'
    assert words == [*shown.split(" | "), "(", "U.S", ".", ")", ".", ".", "."]
    assert "".join(words) == "".join(text.split())
