"""Boxes in rows: conversion of each format to corners in pixels, and errors."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pytest

from lora_cli.data import boxes as module
from lora_cli.data.boxes import (
    BoxError,
    are_objects,
    better_format,
    categories_in,
    nested_names,
    read_objects,
    stated_size,
)

SIZE = (40, 20)
FORMS = {
    "xywh": [4, 6, 8, 10], "xyxy": [4, 6, 12, 16], "relative_xywh": [0.1, 0.3, 0.2, 0.5],
    "relative_xyxy": [0.1, 0.3, 0.3, 0.8], "relative_cxcywh": [0.2, 0.55, 0.2, 0.5],
    "cxcywh": [8, 11, 8, 10],
}  # fmt: skip
CORNERS = [4, 6, 12, 16]


def one(box: Any, category: Any = "cat", **more: Any) -> list[dict[str, Any]]:
    return [{"bbox": box, "category": category, **more}]


def wrong(value: Any, form: str = "xywh", **options: Any) -> str:
    with pytest.raises(BoxError) as caught:
        read_objects(value, SIZE, form, **options)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_each_format_becomes_corners_in_pixels(form: str) -> None:
    result = read_objects(one(FORMS[form]), SIZE, form)
    assert result.boxes.tolist() == [pytest.approx(CORNERS)]
    assert (result.categories, result.crowd.tolist(), len(result)) == (["cat"], [False], 1)
    # the format of an annotation file takes precedence over the recipe's
    lists = {"bbox": [FORMS[form]], "category": ["cat"], "box_format": form}
    for other in FORMS:
        assert read_objects(lists, SIZE, other).boxes.tolist() == [pytest.approx(CORNERS)]


def test_objects_are_a_list_or_an_object_of_lists_or_either_as_json() -> None:
    listed = [{"bbox": CORNERS, "category": "a", "iscrowd": 1}, {"bbox": CORNERS, "category": 3}]
    lists = {"boxes": [CORNERS, CORNERS], "labels": ["a", 3], "is_crowd": [True, 0]}
    for value in (listed, lists, json.dumps(listed), json.dumps(lists)):
        result = read_objects(value, SIZE, "xyxy")
        assert result.boxes.tolist() == [CORNERS, CORNERS]
        assert result.categories == ["a", 3]
        assert result.crowd.tolist() == [True, False]
        assert categories_in(value) == ["a", 3]
    for nothing in ([], {"bbox": [], "category": []}, "[]"):
        result = read_objects(nothing, SIZE)
        assert result.boxes.shape == (0, 4)
        assert len(result) == 0


@pytest.mark.parametrize("box", ["bbox", "bboxes", "box", "boxes"])
@pytest.mark.parametrize("category", ["category", "categories", "category_id", "label", "labels",
                                      "class", "classes", "class_labels"])  # fmt: skip
def test_keys_have_several_names(box: str, category: str) -> None:
    assert read_objects([{box: CORNERS, category: "x"}], SIZE, "xyxy").categories == ["x"]
    assert categories_in({box: [CORNERS], category: ["x"]}) == ["x"]


def test_the_first_known_key_is_used() -> None:
    both = {"box": [9, 9, 9, 9], "bbox": CORNERS, "label": 7, "category_id": 3, "category": "cat",
            "is_crowd": 0, "iscrowd": 1}  # fmt: skip
    result = read_objects([both], SIZE, "xyxy")
    assert (result.boxes.tolist(), result.categories, result.crowd.tolist()) == (
        [CORNERS], ["cat"], [True],
    )  # fmt: skip
    lists = {key: [value] for key, value in both.items()}
    result = read_objects(lists, SIZE, "xyxy")
    assert (result.boxes.tolist(), result.categories, result.crowd.tolist()) == (
        [CORNERS], ["cat"], [True],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("category", "read"),
    [("a", "a"), (" a ", "a"), (3, 3), (3.0, 3), (0, 0), (-1, -1), ("3", "3")],
)
def test_a_category_is_a_name_or_a_number(category: Any, read: str | int) -> None:
    assert categories_in(one(CORNERS, category)) == [read]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is blank"),
        (3, "holds a number, not objects"),
        ("x", "holds the text `x`, not objects"),
        ([3], "holds a list with a number in it, not objects"),
        ([{"category": "a"}], "object 1 has no box: no key is called bbox, bboxes, box"),
        (
            [{"bbox": CORNERS}],
            "object 1 has no category: no key is called category, categories, category_id",
        ),
        ({"category": []}, "holds no boxes: no key is called bbox, bboxes, box"),
        ({"bbox": []}, "holds no categories: no key is called category, categories, category_id"),
        ({"bbox": 3, "category": []}, "`bbox` holds a number, not a list"),
        ({"bbox": [], "category": "a"}, "`category` holds a text, not a list"),
        ({"bbox": [CORNERS], "category": []}, "holds 1 box and 0 categories"),
        ({"bbox": [], "category": ["a"]}, "holds 0 boxes and 1 category"),
        ({"bbox": [CORNERS] * 2, "category": ["a"], "iscrowd": [0]}, "holds 2 boxes and 1 cat"),
        ({"bbox": [CORNERS], "category": ["a"], "iscrowd": []}, "`iscrowd` does not have 1 value"),
        ({"bbox": [CORNERS], "category": ["a"], "iscrowd": 1}, "`iscrowd` does not have 1 value"),
        ([*one(CORNERS), *one(CORNERS, iscrowd=2)], "`iscrowd` of object 2 is `2`, not 0 or 1"),
        (one(CORNERS, " "), "object 1 has a blank category"),
        (one(CORNERS, None), "object 1 has a blank category"),
        ([*one(CORNERS), *one(CORNERS, True)], "the category of object 2 is `true`, not a name or"),
        (one(CORNERS, 1.5), "the category of object 1 is `1.5`, not a name or a whole number"),
        (one(CORNERS, ["a"]), 'the category of object 1 is `["a"]`, not a name or a whole number'),
    ],
)
def test_other_values_are_an_error_that_names_them(value: Any, said: str) -> None:
    with pytest.raises(BoxError) as caught:
        categories_in(value)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("box", "form", "said"),
    [
        ([1, 2, 3], "xywh", "the box of object 1 is not a list of four numbers"),
        ([1, 2, 3, 4, 5], "xywh", "the box of object 1 is not a list of four numbers"),
        ("1 2 3 4", "xywh", "the box of object 1 is not a list of four numbers"),
        ([1, 2, 3, "4"], "xywh", "the box of object 1 holds something that is not a number"),
        ([1, 2, 3, True], "xywh", "the box of object 1 holds something that is not a number"),
        ([1, 2, 3, float("nan")], "xywh", "the box of object 1 holds NaN or infinity"),
        ([float("inf"), 2, 3, 4], "xywh", "the box of object 1 holds NaN or infinity"),
        ([9, 2, 3, 4], "xyxy", "the corners of the box of object 1 are swapped, [9, 2, 3, 4]"),
        ([3, 9, 9, 4], "xyxy", "the corners of the box of object 1 are swapped, [3, 9, 9, 4]"),
        ([9, 2, -3, 4], "xywh", "the box of object 1 has a size below 0, [9, 2, -3, 4]"),
        ([9, 2, 3, -4], "xywh", "the box of object 1 has a size below 0, [9, 2, 3, -4]"),
        ([9, 2, 3, -4], "cxcywh", "the box of object 1 has a size below 0, [9, 2, 3, -4]"),
        ([9, 2, 0, 4], "xywh", "the box of object 1 is empty, [9, 2, 0, 4]"),
        ([9, 2, 3, 0], "cxcywh", "the box of object 1 is empty, [9, 2, 3, 0]"),
        ([9, 2, 9, 4], "xyxy", "the box of object 1 is empty, [9, 2, 9, 4]"),
        ([3, 9, 9, 9], "xyxy", "the box of object 1 is empty, [3, 9, 9, 9]"),
        ([4, 6, 8, 10], "relative_xywh", "the box of object 1 is not in shares of the picture, "
         "[4, 6, 8, 10]: are these pixels?"),
        ([0, 0, 0, 2.1], "relative_xyxy", "the box of object 1 is not in shares of the picture"),
        ([0, 0.5, 1, 0.5], "xywh", "the box of object 1 is smaller than a pixel, [0, 0.5, 1, 0.5]"),
        ([41, 2, 3, 4], "xywh", "the box of object 1, [41, 2, 3, 4], lies outside the picture of "
         "40 x 20 pixels"),
        ([40, 2, 3, 4], "xywh", "the box of object 1, [40, 2, 3, 4], lies outside the picture"),
        ([2, 20, 3, 4], "xywh", "the box of object 1, [2, 20, 3, 4], lies outside the picture"),
        ([-3, 2, 3, 4], "xywh", "the box of object 1, [-3, 2, 3, 4], lies outside the picture"),
        ([2, -4, 3, 4], "xywh", "the box of object 1, [2, -4, 3, 4], lies outside the picture"),
        ([35, 2, 8, 4], "xywh", "the box of object 1, [35, 2, 8, 4], leaves the picture of 40 x 20 "
         "pixels by 3: `--set task.clip_boxes=true`"),
        ([2, 15, 3, 7], "xywh", "the box of object 1, [2, 15, 3, 7], leaves the picture of 40 x 20 "
         "pixels by 2: "),
        ([-1.5, 2, 8, 4], "xywh", "the box of object 1, [-1.5, 2, 8, 4], leaves the picture of 40 "
         "x 20 pixels by 1.5: "),
        ([2, -1.5, 8, 4], "xywh", "the box of object 1, [2, -1.5, 8, 4], leaves the picture of 40 "
         "x 20 pixels by 1.5: "),
    ],
)  # fmt: skip
def test_an_invalid_box_is_an_error_that_names_it(box: Any, form: str, said: str) -> None:
    assert wrong(one(box), form).startswith(said)
    second = wrong([*one([0, 0, 0.5, 0.5] if "relative" in form else [4, 6, 8, 9]), *one(box)],
                   form)  # fmt: skip
    assert second.startswith(said.replace("object 1", "object 2"))


@pytest.mark.parametrize(
    ("box", "form"),
    [([0, 0, 40, 20], "xywh"), ([0, 0, 2, 1], "xywh"), ([0, 0, 1, 1], "relative_xyxy"),
     ([0, 0, 1.5, 1], "xywh"), ([39, 19, 1, 1], "xywh")],
)  # fmt: skip
def test_boxes_at_the_edges_are_valid(box: list[float], form: str) -> None:
    assert len(read_objects(one(box), SIZE, form)) == 1


@pytest.mark.parametrize(
    ("box", "corners"),
    [([-1, -1, 5, 5], [0, 0, 4, 4]), ([36, 16, 5, 5], [36, 16, 40, 20]),
     ([35.5, 2, 5.5, 4], [35.5, 2, 40, 6])],
)  # fmt: skip
def test_a_rounded_box_is_clipped_to_the_image(box: list[float], corners: list[float]) -> None:
    for clip in (False, True):
        assert read_objects(one(box), SIZE, clip=clip).boxes.tolist() == [corners]


def test_a_box_outside_the_image_is_clipped_on_request() -> None:
    result = read_objects(one([-10, 5, 100, 30]), SIZE, clip=True)
    assert result.boxes.tolist() == [[0, 5, 40, 20]]
    assert "lies outside" in wrong(one([50, 5, 9, 9]), clip=True)


@pytest.mark.parametrize(
    ("box", "form", "hint"),
    [
        ([30, 10, 38, 19], "xywh", "; or is it `task.box_format: xyxy`?"),
        ([30, 10, 8, 9], "xyxy", "; or is it `task.box_format: xywh`?"),
        ([0.5, 0.5, 0.9, 0.9], "relative_xywh", "; or is it `task.box_format: relative_xyxy`?"),
        ([0.5, 0.5, 0.2, 0.2], "relative_xyxy", "; or is it `task.box_format: relative_xywh`?"),
        ([300, 10, 380, 19], "xywh", ""),
        ([30, 10, 50, 19], "xywh", ""),  # it would be clipped
    ],
)
def test_another_format_in_which_a_box_is_valid_is_suggested(
    box: list[float], form: str, hint: str
) -> None:
    assert wrong(one(box), form).endswith(hint)
    assert ("; or" in wrong(one(box), form)) == bool(hint)


@pytest.mark.parametrize("box", [[0.1, 0.2, 0.3, 0.4], [-0.9, -0.8, 0.5, 0.5]])
def test_relative_coordinates_instead_of_pixels_are_an_error(box: list[float]) -> None:
    """The second box has corners of Pascal VOC, minus the first pixel."""
    said = "are these shares of the picture?"
    assert wrong(one(box), "xyxy").endswith(f"{said} Then set `task.box_format: relative_…`")
    own = {"bbox": [box], "category": ["a"], "box_format": "xyxy"}  # which cannot be set
    assert wrong(own).endswith(said)


def test_only_the_format_of_coco_files_may_be_questioned() -> None:
    def said(form: str, box: list[float]) -> str:
        return wrong({"bbox": [box], "category": ["a"], "box_format": form})

    assert said("xywh", [30, 10, 38, 19]).endswith(
        "; or are these two corners? COCO's boxes are [x, y, width, height]"
    )
    assert "; or" not in said("xyxy", [30, 10, 8, 9])


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (None, ""), ([], ""), ((40, 20), ""), ([40, 20], ""), ([0, 20], ""), ([40, 0], ""),
        ([41, 20], "the boxes are of a picture of 41 x 20 pixels, and the file has 40 x 20"),
        ([40, 21], "the boxes are of a picture of 40 x 21 pixels, and the file has 40 x 20"),
        ([20, 40], "40 x 20: width and height are exchanged, as where EXIF data turn"),
    ],
)  # fmt: skip
def test_an_image_of_another_size_is_an_error(said: Any, problem: str) -> None:
    if not problem:
        read_objects(one(CORNERS), SIZE, "xyxy", written_size=said)
        return
    assert problem in wrong(one(CORNERS), "xyxy", written_size=said)
    assert ("EXIF" in wrong(one(CORNERS), "xyxy", written_size=said)) == ("EXIF" in problem)


@pytest.mark.parametrize(
    ("about", "size"),
    [
        ({"width": 4, "height": 3}, [4, 3]), ({"width": "4", "height": 3.0}, [4, 3]),
        ({"width": 4}, None), ({"height": 4}, None), ({"width": 0, "height": 3}, None),
        ({"width": 4, "height": -3}, None), ({"width": 4.5, "height": 3}, None),
        ({"width": True, "height": 3}, None), ({"width": "x", "height": 3}, None),
        ({"width": None, "height": 3}, None), ({"width": 1, "height": 1}, [1, 1]),
        ({"width": float("inf"), "height": 3}, None),
    ],
)  # fmt: skip
def test_sizes_are_positive_integers(about: dict[str, Any], size: list[int] | None) -> None:
    assert stated_size(about) == size


@pytest.mark.parametrize(
    ("values", "are"),
    [
        ([one(CORNERS)], True), ([[], one(CORNERS)], True), ([[], []], False), ([], False),
        ([one(CORNERS)] * 9 + [None], True), ([one(CORNERS)] * 8 + [None] * 2, False),
        ([one(CORNERS)] * 8 + [[{"x": 1}]] * 2, False), ([json.dumps(one(CORNERS))], False),
        ([{"bbox": [CORNERS], "category": ["a"]}], True), (["x"], False), ([[1, 2]], False),
    ],
)  # fmt: skip
def test_a_column_has_objects_if_nearly_all_values_are(values: list[Any], are: bool) -> None:
    assert are_objects(values) == are


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("key", ["category", "label"])
def test_category_names_are_found_in_the_type_of_a_column(as_list: bool, key: str) -> None:
    label = datasets.ClassLabel(names=["a", "b"])
    box = datasets.Sequence(datasets.Value("float32"), 4)
    feature: Any
    if as_list:
        feature = datasets.List({"bbox": box, key: label})
    else:
        feature = {"bbox": datasets.List(box), key: datasets.List(label)}
    assert nested_names(feature) == ["a", "b"]
    assert nested_names(datasets.Value("string")) == []
    assert nested_names({"bbox": box, key: datasets.Value("int64")}) == []
    assert nested_names({"bbox": box, "other": label}) == []


@pytest.mark.parametrize(
    ("boxes", "form", "better"),
    [
        ([CORNERS] * 5, "xyxy", None),
        ([[30, 10, 38, 19]] * 5, "xywh", ("xyxy", 5)),
        ([[30, 10, 38, 19]] + [[1, 2, 3, 4]] * 4, "xywh", ("xyxy", 1)),  # a fifth of them
        ([[30, 10, 38, 19]] + [[1, 2, 3, 4]] * 5, "xywh", None),
        ([[30, 10, 8, 9]] * 2, "xyxy", ("xywh", 2)),
        ([[2, 15, 3, 8], [38, 15, 3, 8]], "xywh", ("cxcywh", 2)),
        ([[0.5, 0.5, 0.9, 0.9]] * 2, "relative_xywh", ("relative_xyxy", 2)),
        ([[300, 10, 8, 9]] * 2, "xywh", None),
        ([[30, 10, 38, 19], [20, 2, 10, 9]], "xywh", None),  # no other format fits all
    ],
)
def test_a_format_that_fits_all_is_proposed_if_many_boxes_are_outside(
    boxes: list[list[float]], form: str, better: tuple[str, int] | None
) -> None:
    known = [(one(box), SIZE) for box in boxes]
    assert better_format(known, form) == better
    of_files = [
        ({"bbox": [[300, 1, 2, 3]], "category": ["a"], "box_format": "xywh"}, SIZE)
    ] * 20  # whose form is known
    assert better_format([*known, *of_files], form) == better


def test_objects_have_a_length() -> None:
    result = module.Objects(np.zeros((2, 4)), ["a", 1], np.zeros(2, dtype=bool))
    assert len(result) == 2
