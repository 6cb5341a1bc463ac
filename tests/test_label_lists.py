from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_cli.data.column_kinds import describe_column
from lora_cli.data.label_lists import list_in_cell, listed_labels, texts_in_cell


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("['a', 'b']", ["a", "b"]), ('["a", "b"]', ["a", "b"]), ("[1, 2]", [1, 2]), ("[]", []),
        ("('a', 'b')", ["a", "b"]), ("{'b', 'a'}", ["a", "b"]), ("['a' 'b']", ["a", "b"]),
        ("['a'\n 'b']", ["a", "b"]), (" ['a'] ", ["a"]), ('["it\'s", "b"]', ["it's", "b"]),
        ("a, b", None), ("[a, b]", None), ("(positive)", None), ("{}", None), ('{"a": 1}', None),
        ("[['a']]", None), ("[None]", None), ("[" * 5000 + "]" * 5000, None), ("", None),
        ("[1, 2", None), ("[].__class__", None), ("2,25", None), (["a"], None), (3, None),
    ],
)  # fmt: skip
def test_lists_in_text_are_read(value: Any, items: list[Any] | None) -> None:
    assert listed_labels(value) == items


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("['EU' 'rejects'\n \"it's\" 'a \\' b']", ["EU", "rejects", "it's", "a ' b"]),
        ("['a', ' ', 'b']", ["a", " ", "b"]), ('["a", " ", "b"]', ["a", " ", "b"]),
        ("['a' ' ' 'b']", ["a", " ", "b"]), ("['a']", ["a"]), ("[]", []), ("[1, [2]]", [1, [2]]),
        (["a"], ["a"]), ("('a', 'b')", None), ("a b", None), ("['a' b]", None), ("[a]", None),
    ],
)  # fmt: skip
def test_lists_of_words_are_read_with_and_without_commas(
    value: Any, items: list[Any] | None
) -> None:
    assert list_in_cell(value) == items


def test_objects_printed_by_numpy_are_read() -> None:
    objects = [{"role": "user", "content": "a } { 'b'"}, {"role": "assistant", "content": 'c "d"'}]
    for some in (objects[:1], objects, objects * 4):
        assert list_in_cell(str(np.array(some, dtype=object))) == some


def test_a_cell_has_one_text_or_a_list_of_texts() -> None:
    assert texts_in_cell('["a b", "c"]') == texts_in_cell(["a b", "c"]) == ["a b", "c"]
    assert texts_in_cell("a b") == ["a b"]
    assert texts_in_cell("[1]") == ["[1]"]
    assert texts_in_cell("[sic]") == ["[sic]"]
    assert texts_in_cell("[]") == []


def test_a_column_of_lists_is_recognised() -> None:
    rows = [{"tags": "['a', 'b']"}, {"tags": "[]"}, {"tags": "['b']"}]
    column = describe_column("tags", rows)
    assert (column.kind, dict(column.counts)) == ("list", {"a": 1, "b": 2})
    assert describe_column("tags", [*rows, {"tags": "b"}]).kind != "list"
