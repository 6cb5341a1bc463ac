"""Tests of object detection labels, and of the task that `lora init` proposes for boxes."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lora_cli.data.column_kinds import describe_column
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe
from lora_cli.tasks.detection import detection_labels
from lora_cli.tasks.detection.detection_labels import DetectionLabels
from lora_cli.tasks.detection.detection_proposals import MAX_IMAGE_SIZE, propose_objects
from lora_cli.tasks.proposal import Certainty, Proposal, Table

Box = tuple[Any, list[float]]


class Split(list):
    """In-memory rows with places."""

    source = "rows.jsonl"

    def __init__(self, *rows: list[Any], names: dict[str, list[str]] | None = None) -> None:
        super().__init__({"objects": objects(*categories)} for categories in rows)
        self.label_names = names or {}

    def place(self, i: int) -> str:
        return f"rows.jsonl:{i + 1}"


STREAM = {"train": "rows.jsonl", "streaming": True}


def objects(*categories: Any, box: list[float] | None = None) -> list[dict[str, Any]]:
    return [{"bbox": box or [1, 2, 3, 4], "category": category} for category in categories]


def build_labels(data: dict[str, Any] | None = None, **task: Any) -> DetectionLabels:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": "object_detection", **task},
            "data": data or {"path": "rows.jsonl"},
            "train": {"max_steps": 3},
        }
    )
    return DetectionLabels(recipe, recipe.task)  # type: ignore[arg-type]


def learn_labels(*rows: list[Any], names: list[str] | None = None, **task: Any) -> DetectionLabels:
    found = build_labels(**task)
    found.learn({"train": Split(*rows, names={"objects": names} if names else None)})  # type: ignore[dict-item]
    return found


# ---------------------------------------------------------------------------------- the label set


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([["dog", "cat"], ["cat"], []], ["cat", "dog"]),
        ([[10, 9], [2]], ["2", "9", "10"]),  # as numbers
        ([["10", "9"], ["2"]], ["2", "9", "10"]),
        ([["10", "9"], ["x"]], ["10", "9", "x"]),  # as texts
    ],
)
def test_labels_are_inferred_and_sorted(rows: list[list[Any]], expected: list[str]) -> None:
    assert learn_labels(*rows).names == expected


def test_the_data_set_s_names_take_precedence() -> None:
    labels = learn_labels([1], [0, 1], names=["dog", "cat", "bird"])
    assert labels.names == ["dog", "cat", "bird"]
    assert labels.category_names == ["dog", "cat", "bird"]
    assert [labels.position(i) for i in (0, 1, 2, 3)] == [0, 1, 2, None]
    assert dict(labels.count(Split([1], [0, 1]))) == {"cat": 2, "dog": 1}  # type: ignore[arg-type]


def test_partly_different_names_are_not_matched_by_index() -> None:
    with pytest.raises(LoraError, match="`cow`"):
        learn_labels([0, 1, 2], names=["dog", "cat", "cow"], labels=["dog", "bird", "cat"])
    renamed = learn_labels([0, 1], names=["dog", "cat"], labels=["Hund", "Katze"])
    assert [renamed.position(i) for i in (0, 1)] == [0, 1]


def test_labels_of_the_recipe_are_stripped_and_keep_their_order() -> None:
    labels = learn_labels(["dog"], labels=[" dog ", "cat"])
    assert labels.names == ["dog", "cat"]
    assert [labels.position(name) for name in ("dog", "cat", "cow")] == [0, 1, None]


def test_without_train_rows_the_recipe_must_name_the_labels() -> None:
    with pytest.raises(LoraError, match="the labels are not known") as caught:
        build_labels().learn({"test": Split(["cat"])})  # type: ignore[dict-item]
    assert caught.value.problems[0].at.startswith("task.labels")
    labels = build_labels(labels=["cat"])
    labels.learn({"test": Split(["cat"], [])})  # type: ignore[dict-item]
    assert labels.names == ["cat"]


def test_a_train_split_without_objects_is_rejected() -> None:
    with pytest.raises(LoraError, match="no row of the train split has an object"):
        learn_labels([], [], labels=["cat"])
    labels = build_labels(labels=["cat"])
    labels.learn({"train": Split(["cat"]), "test": Split([])})  # type: ignore[dict-item]


@pytest.mark.parametrize("order", [1, -1])
def test_a_train_split_with_only_crowds_is_rejected(order: int) -> None:
    split = Split(["cat"], [])
    split[0]["objects"][0]["iscrowd"] = 1
    split[:] = split[::order]
    with pytest.raises(LoraError) as caught:
        build_labels(labels=["cat"]).learn({"train": split})  # type: ignore[dict-item]
    assert caught.value.problems[0].what == (
        "all objects of the train split are marked as `iscrowd` or `difficult`, and such are not "
        "trained"
    )
    split.append({"objects": objects("cat")})
    build_labels(labels=["cat"]).learn({"train": split})  # type: ignore[dict-item]


def test_names_of_a_stream_come_from_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        detection_labels, "stream_label_names", lambda _: {"objects": ["a", "b"], "more": ["c"]}
    )
    labels = build_labels(STREAM, labels=["b", "a"])
    labels.learn({})
    assert labels.category_names == ["a", "b"]
    assert [labels.position(i) for i in (0, 1)] == [1, 0]
    labels = build_labels(labels=["b", "a"])
    labels.learn({})
    assert labels.category_names == []


# --------------------------------------------------------------------------- category to label


@pytest.mark.parametrize(
    ("names", "data_names", "expected"),
    [
        # the data set names its categories: an index is one of its names
        (["a", "b"], ["a", "b"], {0: "a", 1: "b", 2: "2", -1: "-1", "a": "a", "x": "x"}),
        # the recipe orders the same names differently: categories are matched by name
        (["b", "a"], ["a", "b"], {0: "a", 1: "b"}),
        # the recipe has other names: categories are renamed by index
        (["x", "y"], ["a", "b"], {0: "x", 1: "y"}),
        # an index beyond the recipe's labels keeps the data set's name
        (["x"], ["a", "b"], {0: "x", 1: "b"}),
        # the data set has no names: indices, unless a label is itself a number
        (["a", "b"], [], {0: "a", 1: "b", 2: "2", -1: "-1"}),
        (["1", "2"], [], {1: "1", 2: "2", 0: "0", "1": "1"}),
        (["a", "5"], [], {0: "0", 5: "5"}),
        ([], ["a", "b"], {0: "a", 1: "b"}),
        ([], [], {0: "0", 3: "3"}),
    ],
)
def test_a_category_is_a_name_or_an_index(
    names: list[str], data_names: list[str], expected: dict[Any, str]
) -> None:
    labels = build_labels()
    labels.names, labels.category_names = names, data_names
    assert {category: labels.name_of(category) for category in expected} == expected
    assert {category: labels.position(category) for category in expected} == {
        category: (names.index(name) if name in names else None)
        for category, name in expected.items()
    }


def test_the_labels_of_a_row_are_unique_and_in_label_order() -> None:
    labels = learn_labels(["dog", "cat"], labels=["dog", "cat", "cow"])
    assert labels.names_in({"objects": objects("cat", "dog", "cat", "fox")}) == ["dog", "cat"]
    assert labels.names_in({"objects": "nothing"}) == []
    assert labels.names_in({}) == []


# -------------------------------------------------------------------------- unknown categories


def test_the_first_unknown_category_of_a_row_is_reported() -> None:
    labels = learn_labels(["dog", "cat"])
    assert labels.problem({"objects": objects("cat", "dog")}, "here") is None
    problem = labels.problem({"objects": objects("cat", "cow", "fox")}, "here")
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
def test_hints_for_unknown_categories(category: str, names: list[str], hint: str) -> None:
    labels = learn_labels([names[0]], labels=names)
    problem = labels.problem({"objects": objects(category)}, "here")
    assert problem is not None
    assert hint in str(problem.hint)
    assert str(problem.hint).count("x, ") <= 19  # at most 20 labels are listed


def test_unknown_categories_are_reported_with_count_and_first_place() -> None:
    labels = build_labels(labels=["cat"])
    with pytest.raises(LoraError) as caught:
        labels.learn({"train": Split(["cat"]), "test": Split(["cat"], ["cow"], ["fox", "cow"])})  # type: ignore[dict-item]
    assert [(p.what, p.at) for p in caught.value.problems] == [
        ("`cow` is not a label (2 objects of test)", "rows.jsonl:2"),
        ("`fox` is not a label (1 object of test)", "rows.jsonl:3"),
    ]


@pytest.mark.parametrize(("n", "rest"), [(10, None), (11, "1 more category of train are not"),
                                         (13, "3 more categories of train are not")])  # fmt: skip
def test_at_most_ten_unknown_categories_are_listed(n: int, rest: str | None) -> None:
    with pytest.raises(LoraError) as caught:
        learn_labels(["cat"], [f"x{i}" for i in range(n)], labels=["cat"])
    messages = [problem.what for problem in caught.value.problems]
    assert [message.split("`")[1] for message in messages[:10]] == [f"x{i}" for i in range(10)]
    assert len(messages) == (10 if rest is None else 11)
    if rest is not None:
        assert messages[10].startswith(rest)


# --------------------------------------------------------------------------- proposals


def png_image(width: int, height: int) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def proposal(rows: list[dict[str, Any]], label: str | None = None, **base: Any) -> Proposal | None:
    names = list(rows[0])
    table = Table([describe_column(name, rows) for name in names], rows, "rows.jsonl", label=label)
    facts = {"name": "base", "model_type": "yolos", "generates_images": False, **base}
    return propose_objects(table, SimpleNamespace(**facts))


def require_proposal(*arguments: Any, **base: Any) -> Proposal:
    result = proposal(*arguments, **base)
    assert result is not None
    return result


def rows_of(*boxes: list[float], image: str = "image", column: str = "objects", side: int = 40,
            **other_columns: Any) -> list[dict[str, Any]]:  # fmt: skip
    return [
        {image: png_image(side, 30), column: objects("cat", "dog", box=box), **other_columns}
        for box in boxes
    ]


def test_a_proposal_has_a_reason_for_each_key() -> None:
    proposed = require_proposal(rows_of([1, 2, 30, 20], [0, 0, 40, 30]))
    assert proposed.certainty == Certainty.ONLY
    assert proposed.keys == {"type": "object_detection", "image_size": 64}
    assert proposed.why[""] == "boxes of 2 labels"
    assert "40 pixels" in proposed.why["image_size"]
    assert proposed.inputs == ["image"]
    assert proposed.labels == {"cat": 2, "dog": 2}
    assert proposed.left_out == {}
    assert proposed.row_error is not None
    assert proposed.row_error({"objects": objects("cat")}) == ""
    assert proposed.row_error({"objects": "x"}) == "holds the text `x`, not objects"


def test_other_column_names_are_proposed() -> None:
    proposed = require_proposal(
        rows_of([1, 2, 3, 4], image="photo", column="things", id=7, name="x")
    )
    assert proposed.keys["image_column"] == "photo"
    assert proposed.keys["objects_column"] == "things"
    assert proposed.inputs == ["photo"]
    assert proposed.left_out == {"id": "not needed", "name": "not needed"}


@pytest.mark.parametrize(
    ("boxes", "box_format"),
    [
        ([[1, 2, 30, 20]], None),
        ([[1, 2, 30, 90]], None),  # fits in no format
        ([[20, 5, 38, 29], [0, 0, 40, 30]], "xyxy"),
        ([[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.2, 0.2]], "relative_cxcywh"),
        ([[0.0, 0.0, 0.5, 0.9], [0.1, 0.1, 0.9, 0.9]], "relative_xywh"),
        ([[0.6, 0.6, 0.9, 1.0], [0.1, 0.0, 0.9, 0.9]], "relative_xyxy"),
    ],
)
def test_the_box_format_is_the_first_in_which_all_boxes_fit(
    boxes: list[list[float]], box_format: str | None
) -> None:
    assert require_proposal(rows_of(*boxes)).keys.get("box_format") == box_format


@pytest.mark.parametrize(
    ("side", "size"), [(32, 32), (33, 64), (64, 64), (639, 640), (640, 640), (2000, MAX_IMAGE_SIZE)]
)
def test_the_image_size_is_that_of_the_largest_image_up_to_a_limit(side: int, size: int) -> None:
    assert require_proposal(rows_of([1, 2, 3, 4], side=side)).keys["image_size"] == size
    assert MAX_IMAGE_SIZE == 640


def test_unreadable_images_leave_format_and_size_open() -> None:
    rows = [{"image": {"bytes": None, "path": f"{i}.png"}, "objects": objects("cat")}
            for i in range(3)]  # fmt: skip
    assert require_proposal(rows).keys == {"type": "object_detection"}


@pytest.mark.parametrize(
    ("base", "label", "proposes"),
    [
        ({}, None, True),
        ({}, "objects", True),
        ({}, "image", False),
        ({"generates_images": True}, None, False),
    ],
)
def test_diffusion_bases_and_other_labels_are_not_for_detection(
    base: dict[str, Any], label: str | None, proposes: bool
) -> None:
    assert (proposal(rows_of([1, 2, 3, 4]), label, **base) is not None) == proposes


def test_rows_without_boxes_are_not_for_detection() -> None:
    assert proposal([{"image": png_image(3, 3), "text": "a"}]) is None


@pytest.mark.parametrize("kind", ["yolos", "detr", None])
def test_object_detectors_are_accepted(kind: str | None) -> None:
    assert require_proposal(rows_of([1, 2, 3, 4]), model_type=kind).error is None


def test_errors_of_rows_with_boxes() -> None:
    error = require_proposal(rows_of([1, 2, 3, 4]), model_type="vit").error
    assert error is not None
    assert "`base` does not find objects, and rows.jsonl holds boxes" in str(error)
    for rows, columns in (
        ([{"objects": objects("cat"), "name": "x"}], "name"),
        ([{"objects": objects("cat")}], "no others"),
    ):
        error = require_proposal(rows).error
        assert error is not None
        assert "no column holds the pictures" in str(error)
        assert f"the columns are {columns}" in str(error)
