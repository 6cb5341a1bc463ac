"""Labels of objects: which there are, what a category means, and what `init` proposes for boxes."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lora_cli.data.column_kinds import describe
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe
from lora_cli.tasks.detection import detection_labels
from lora_cli.tasks.detection.detection_labels import DetectionLabels
from lora_cli.tasks.detection.detection_proposals import MAX_IMAGE_SIZE, propose_objects
from lora_cli.tasks.proposal import Certainty, Proposal, Table

Box = tuple[Any, list[float]]


class Split(list):
    """Rows in memory that have places."""

    source = "rows.jsonl"

    def __init__(self, *rows: list[Any], names: dict[str, list[str]] | None = None) -> None:
        super().__init__({"objects": objects(*categories)} for categories in rows)
        self.label_names = names or {}

    def place(self, i: int) -> str:
        return f"rows.jsonl:{i + 1}"


STREAM = {"train": "rows.jsonl", "streaming": True}


def objects(*categories: Any, box: list[float] | None = None) -> list[dict[str, Any]]:
    return [{"bbox": box or [1, 2, 3, 4], "category": category} for category in categories]


def labels(data: dict[str, Any] | None = None, **task: Any) -> DetectionLabels:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": "object_detection", **task},
            "data": data or {"path": "rows.jsonl"},
            "train": {"max_steps": 3},
        }
    )
    return DetectionLabels(recipe, recipe.task)  # type: ignore[arg-type]


def learned(*rows: list[Any], names: list[str] | None = None, **task: Any) -> DetectionLabels:
    found = labels(**task)
    found.learn({"train": Split(*rows, names={"objects": names} if names else None)})  # type: ignore[dict-item]
    return found


# ---------------------------------------------------------------------------------- which there are


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([["dog", "cat"], ["cat"], []], ["cat", "dog"]),
        ([[10, 9], [2]], ["2", "9", "10"]),  # as numbers
        ([["10", "9"], ["2"]], ["2", "9", "10"]),
        ([["10", "9"], ["x"]], ["10", "9", "x"]),  # as texts
    ],
)
def test_labels_are_those_that_are_found_in_their_order(
    rows: list[list[Any]], wanted: list[str]
) -> None:
    assert learned(*rows).names == wanted


def test_names_of_the_data_set_come_before_what_is_found() -> None:
    found = learned([1], [0, 1], names=["dog", "cat", "bird"])
    assert found.names == ["dog", "cat", "bird"]
    assert found.category_names == ["dog", "cat", "bird"]
    assert [found.position(i) for i in (0, 1, 2, 3)] == [0, 1, 2, None]
    assert dict(found.count(Split([1], [0, 1]))) == {"cat": 2, "dog": 1}  # type: ignore[arg-type]


def test_categories_of_which_some_have_other_names_are_not_read_by_position() -> None:
    with pytest.raises(LoraError, match="`cow`"):
        learned([0, 1, 2], names=["dog", "cat", "cow"], labels=["dog", "bird", "cat"])
    renamed = learned([0, 1], names=["dog", "cat"], labels=["Hund", "Katze"])
    assert [renamed.position(i) for i in (0, 1)] == [0, 1]


def test_labels_of_the_recipe_keep_their_order_without_blanks() -> None:
    found = learned(["dog"], labels=[" dog ", "cat"])
    assert found.names == ["dog", "cat"]
    assert [found.position(name) for name in ("dog", "cat", "cow")] == [0, 1, None]


def test_without_train_rows_the_recipe_has_to_name_them() -> None:
    with pytest.raises(LoraError, match="the labels are not known") as caught:
        labels().learn({"test": Split(["cat"])})  # type: ignore[dict-item]
    assert caught.value.problems[0].at.startswith("task.labels")
    found = labels(labels=["cat"])
    found.learn({"test": Split(["cat"], [])})  # type: ignore[dict-item]
    assert found.names == ["cat"]


def test_a_train_split_without_objects_is_rejected() -> None:
    with pytest.raises(LoraError, match="no row of the train split has an object"):
        learned([], [], labels=["cat"])
    found = labels(labels=["cat"])
    found.learn({"train": Split(["cat"]), "test": Split([])})  # type: ignore[dict-item]


@pytest.mark.parametrize("order", [1, -1])
def test_a_train_split_whose_objects_are_all_left_out_is_rejected(order: int) -> None:
    split = Split(["cat"], [])
    split[0]["objects"][0]["iscrowd"] = 1
    split[:] = split[::order]
    with pytest.raises(LoraError) as caught:
        labels(labels=["cat"]).learn({"train": split})  # type: ignore[dict-item]
    assert caught.value.problems[0].what == (
        "all objects of the train split are marked as `iscrowd` or `difficult`, and such are not "
        "trained"
    )
    split.append({"objects": objects("cat")})
    labels(labels=["cat"]).learn({"train": split})  # type: ignore[dict-item]


def test_names_of_a_stream_come_from_its_own_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        detection_labels, "stream_label_names", lambda _: {"objects": ["a", "b"], "more": ["c"]}
    )
    found = labels(STREAM, labels=["b", "a"])
    found.learn({})
    assert found.category_names == ["a", "b"]
    assert [found.position(i) for i in (0, 1)] == [1, 0]
    found = labels(labels=["b", "a"])
    found.learn({})
    assert found.category_names == []


# --------------------------------------------------------------------------- what a category means


@pytest.mark.parametrize(
    ("names", "of_data", "wanted"),
    [
        # the data set names its categories: a position is a name
        (["a", "b"], ["a", "b"], {0: "a", 1: "b", 2: "2", -1: "-1", "a": "a", "x": "x"}),
        # in another order in the recipe, names count
        (["b", "a"], ["a", "b"], {0: "a", 1: "b"}),
        # other names in the recipe rename by position
        (["x", "y"], ["a", "b"], {0: "x", 1: "y"}),
        # a position beyond the recipe's labels keeps the data set's name
        (["x"], ["a", "b"], {0: "x", 1: "b"}),
        # the data set has no names: positions, if no label is a number itself
        (["a", "b"], [], {0: "a", 1: "b", 2: "2", -1: "-1"}),
        (["1", "2"], [], {1: "1", 2: "2", 0: "0", "1": "1"}),
        (["a", "5"], [], {0: "0", 5: "5"}),
        ([], ["a", "b"], {0: "a", 1: "b"}),
        ([], [], {0: "0", 3: "3"}),
    ],
)
def test_a_category_is_a_name_or_a_position(
    names: list[str], of_data: list[str], wanted: dict[Any, str]
) -> None:
    found = labels()
    found.names, found.category_names = names, of_data
    assert {category: found.name_of(category) for category in wanted} == wanted
    assert {category: found.position(category) for category in wanted} == {
        category: (names.index(name) if name in names else None)
        for category, name in wanted.items()
    }


def test_the_labels_of_a_row_are_listed_once_in_the_labels_order() -> None:
    found = learned(["dog", "cat"], labels=["dog", "cat", "cow"])
    assert found.names_in({"objects": objects("cat", "dog", "cat", "fox")}) == ["dog", "cat"]
    assert found.names_in({"objects": "nothing"}) == []
    assert found.names_in({}) == []


# ------------------------------------------------------------------------------ what is no label


def test_the_first_category_of_a_row_that_is_no_label_is_named() -> None:
    found = learned(["dog", "cat"])
    assert found.problem({"objects": objects("cat", "dog")}, "here") is None
    problem = found.problem({"objects": objects("cat", "cow", "fox")}, "here")
    assert problem is not None
    assert (problem.what, problem.at) == ("`cow` is not a label", "here")


@pytest.mark.parametrize(
    ("category", "names", "hint"),
    [
        ("caf\u0065\u0301", ["caf\u00e9"], "the normal form of Unicode (cafe\\u0301 and caf\\xe9)"),
        ("Cat", ["dog", "cat"], "it is the label `cat` but for case: write both alike"),
        ("7", ["dog", "cat"], "positions are 0 to 1: dog, cat"),
        ("7", ["1", "2"], "fix the rows, or name it in `task.labels`"),
        ("7", [str(i) + "x" for i in range(30)], "positions are 0 to 29: 0x, 1x, 2x"),
        ("cta", ["dog", "cat"], "did you mean `cat`?"),
    ],
)
def test_a_hint_says_what_may_be_meant(category: str, names: list[str], hint: str) -> None:
    found = learned([names[0]], labels=names)
    problem = found.problem({"objects": objects(category)}, "here")
    assert problem is not None
    assert hint in str(problem.hint)
    assert str(problem.hint).count("x, ") <= 19  # of many, twenty


def test_unknown_categories_are_counted_and_placed_where_they_stand_first() -> None:
    found = labels(labels=["cat"])
    with pytest.raises(LoraError) as caught:
        found.learn({"train": Split(["cat"]), "test": Split(["cat"], ["cow"], ["fox", "cow"])})  # type: ignore[dict-item]
    assert [(p.what, p.at) for p in caught.value.problems] == [
        ("`cow` is not a label (2 objects of test)", "rows.jsonl:2"),
        ("`fox` is not a label (1 object of test)", "rows.jsonl:3"),
    ]


@pytest.mark.parametrize(("n", "more"), [(10, None), (11, "1 more category of train are not"),
                                         (13, "3 more categories of train are not")])  # fmt: skip
def test_of_many_unknown_categories_ten_are_named(n: int, more: str | None) -> None:
    with pytest.raises(LoraError) as caught:
        learned(["cat"], [f"x{i}" for i in range(n)], labels=["cat"])
    found = [problem.what for problem in caught.value.problems]
    assert [what.split("`")[1] for what in found[:10]] == [f"x{i}" for i in range(10)]
    assert len(found) == (10 if more is None else 11)
    if more is not None:
        assert found[10].startswith(more)


# --------------------------------------------------------------------------- what `init` proposes


def picture(width: int, height: int) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def proposal(rows: list[dict[str, Any]], label: str | None = None, **base: Any) -> Proposal | None:
    names = list(rows[0])
    table = Table([describe(name, rows) for name in names], rows, "rows.jsonl", label=label)
    facts = {"name": "base", "model_type": "yolos", "draws": False, **base}
    return propose_objects(table, SimpleNamespace(**facts))


def taken(*given: Any, **base: Any) -> Proposal:
    found = proposal(*given, **base)
    assert found is not None
    return found


def rows_of(*boxes: list[float], image: str = "image", column: str = "objects", side: int = 40,
            **more: Any) -> list[dict[str, Any]]:  # fmt: skip
    return [
        {image: picture(side, 30), column: objects("cat", "dog", box=box), **more} for box in boxes
    ]


def test_a_picture_with_boxes_is_proposed_with_the_reason_for_each_key() -> None:
    found = taken(rows_of([1, 2, 30, 20], [0, 0, 40, 30]))
    assert found.certainty == Certainty.ONLY
    assert found.keys == {"type": "object_detection", "image_size": 64}
    assert found.why[""] == "boxes of 2 labels"
    assert "40 pixels" in found.why["image_size"]
    assert found.inputs == ["image"]
    assert found.labels == {"cat": 2, "dog": 2}
    assert found.left_out == {}
    assert found.row_error is not None
    assert found.row_error({"objects": objects("cat")}) == ""
    assert found.row_error({"objects": "x"}) == "holds the text `x`, not objects"


def test_other_columns_are_named_or_left_out() -> None:
    found = taken(rows_of([1, 2, 3, 4], image="photo", column="things", id=7, name="x"))
    assert found.keys["image_column"] == "photo"
    assert found.keys["objects_column"] == "things"
    assert found.inputs == ["photo"]
    assert found.left_out == {"id": "not needed", "name": "not needed"}


@pytest.mark.parametrize(
    ("boxes", "form"),
    [
        ([[1, 2, 30, 20]], None),
        ([[1, 2, 30, 90]], None),  # in no form
        ([[20, 5, 38, 29], [0, 0, 40, 30]], "xyxy"),
        ([[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.2, 0.2]], "relative_cxcywh"),
        ([[0.0, 0.0, 0.5, 0.9], [0.1, 0.1, 0.9, 0.9]], "relative_xywh"),
        ([[0.6, 0.6, 0.9, 1.0], [0.1, 0.0, 0.9, 0.9]], "relative_xyxy"),
    ],
)
def test_the_form_is_the_first_by_which_all_boxes_lie_in_their_pictures(
    boxes: list[list[float]], form: str | None
) -> None:
    assert taken(rows_of(*boxes)).keys.get("box_format") == form


@pytest.mark.parametrize(
    ("side", "size"), [(32, 32), (33, 64), (64, 64), (639, 640), (640, 640), (2000, MAX_IMAGE_SIZE)]
)
def test_pictures_are_read_as_large_as_the_largest_up_to_a_limit(side: int, size: int) -> None:
    assert taken(rows_of([1, 2, 3, 4], side=side)).keys["image_size"] == size
    assert MAX_IMAGE_SIZE == 640


def test_pictures_that_cannot_be_read_from_here_leave_form_and_size_open() -> None:
    rows = [{"image": {"bytes": None, "path": f"{i}.png"}, "objects": objects("cat")}
            for i in range(3)]  # fmt: skip
    assert taken(rows).keys == {"type": "object_detection"}


@pytest.mark.parametrize(
    ("base", "label", "proposes"),
    [
        ({}, None, True),
        ({}, "objects", True),
        ({}, "image", False),
        ({"draws": True}, None, False),
    ],
)
def test_a_base_that_draws_and_another_label_are_not_for_boxes(
    base: dict[str, Any], label: str | None, proposes: bool
) -> None:
    assert (proposal(rows_of([1, 2, 3, 4]), label, **base) is not None) == proposes


def test_rows_without_boxes_are_left_to_others() -> None:
    assert proposal([{"image": picture(3, 3), "text": "a"}]) is None


@pytest.mark.parametrize("kind", ["yolos", "detr", None])
def test_bases_that_find_objects_fit(kind: str | None) -> None:
    assert taken(rows_of([1, 2, 3, 4]), model_type=kind).error is None


def test_what_keeps_boxes_from_being_learned_is_named() -> None:
    error = taken(rows_of([1, 2, 3, 4]), model_type="vit").error
    assert error is not None
    assert "`base` does not find objects, and rows.jsonl holds boxes" in str(error)
    for rows, others in (
        ([{"objects": objects("cat"), "name": "x"}], "name"),
        ([{"objects": objects("cat")}], "no others"),
    ):
        error = taken(rows).error
        assert error is not None
        assert "no column holds the pictures" in str(error)
        assert f"the columns are {others}" in str(error)
