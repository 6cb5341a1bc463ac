"""Images with separate annotation files: Pascal VOC, YOLO, COCO, and Hub data sets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_detectors
from faster_coco_eval.core import mask as coco_masks
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from lora_cli.data.boxes import BoxError, better_format, read_objects
from lora_cli.data.coco_rows import _box_of_mask, read_coco
from lora_cli.data.load_rows import load_rows
from lora_cli.data.numbered_labels import holds_numbers, parquet_label_names
from lora_cli.data.pictures import picture_facts
from lora_cli.data.yolo import _labels_in
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_adapter import with_test_file
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe
from lora_cli.tasks import build_task

Json = dict[str, Any]
SPLITS = {"train": range(1, 5), "val": range(5, 7)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_of(**data: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "none"}, "task": {"type": "object_detection"}, "data": data}
    )


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def draw(file: Path, seed: int) -> tuple[tuple[int, int], Json]:
    image, objects = tiny_detectors.scene(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return image.size, objects


def write_voc(picture: Path, annotation: Path, seed: int) -> None:
    (width, height), objects = draw(picture, seed)
    inside = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for name, (x, y, w, h) in zip(objects["category"], objects["bbox"], strict=True)
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    put(annotation, f"<annotation>{size}{inside}</annotation>")


def write_yolo(picture: Path, annotation: Path, seed: int) -> None:
    (width, height), objects = draw(picture, seed)
    lines = [
        f"{tiny_detectors.LABELS.index(name)} {(x + w / 2) / width:.8f} {(y + h / 2) / height:.8f} "
        f"{w / width:.8f} {h / height:.8f}"
        for name, (x, y, w, h) in zip(objects["category"], objects["bbox"], strict=True)
    ]
    if lines:  # an image without objects has no annotation file
        put(annotation, "\n".join(lines) + "\n")


def voc(root: Path) -> Json:
    for split, seeds in SPLITS.items():
        put(root / f"ImageSets/Main/{split}.txt", "".join(f"{i}  1\n" for i in seeds))
        for i in seeds:
            write_voc(root / f"JPEGImages/{i}.png", root / f"Annotations/{i}.xml", i)
    draw(root / "SegmentationClass" / "1.png", 9)  # not a row
    return {"path": str(root), "validation": "validation"}


def voc_side_by_side(root: Path) -> Json:
    for split, seeds in SPLITS.items():
        for i in seeds:
            write_voc(root / f"{split}/{i}.png", root / f"{split}/{i}.xml", i)
    return {"path": str(root), "validation": "validation"}


def yolo(root: Path) -> Json:
    for split, seeds in SPLITS.items():
        for i in seeds:
            picture, labels = root / f"images/{split}/{i}.png", root / f"labels/{split}/{i}.txt"
            write_yolo(picture, labels, i)
    text = "path: .\ntrain: images/train\nval: images/val\nnames: {1: light, 0: dark}\n"
    put(root / "data.yaml", text)
    return {"path": str(root / "data.yaml"), "validation": "validation"}


def yolo_by_folders(root: Path) -> Json:
    for split, seeds in SPLITS.items():
        for i in seeds:
            picture, labels = root / f"{split}/images/{i}.png", root / f"{split}/labels/{i}.txt"
            write_yolo(picture, labels, i)
    put(root / "classes.txt", "dark\nlight\n")
    return {"path": str(root), "validation": "validation"}


def coco(root: Path) -> Json:
    tiny_detectors.write_coco(root, {"train": 4, "validation": 2})
    names = {"train": "train", "validation": "validation"}
    return {split: str(root / f"{name}.json") for split, name in names.items()}


def roboflow(root: Path) -> Json:
    data = yolo_by_folders(root)
    (root / "classes.txt").unlink()
    text = "train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['dark', 'light']\n"
    put(root / "data.yaml", text)
    return data


FORMS = {
    "voc": voc, "voc side by side": voc_side_by_side, "yolo": yolo, "coco": coco,
    "yolo by folders": yolo_by_folders, "yolo as exported": roboflow,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_formats_give_the_same_rows(form: str, tmp_path: Path) -> None:
    result = load_rows(recipe_of(**FORMS[form](tmp_path / "set")))
    seeds = {"train": SPLITS["train"], "validation": SPLITS["val"]}
    assert {split: len(rows) for split, rows in result.items()} == {"train": 4, "validation": 2}
    for split, rows in result.items():
        for row, seed in zip(rows, seeds[split], strict=True):
            image, objects = tiny_detectors.scene(seed)
            facts = picture_facts(row["image"])
            assert (facts.width, facts.height) == image.size
            read = read_objects(row["objects"], image.size)
            expected = [[x, y, x + w, y + h] for x, y, w, h in objects["bbox"]]
            assert read.boxes.tolist() == [pytest.approx(box, abs=1e-4) for box in expected]
            assert read.categories == objects["category"]
    names = result["train"].label_names.get("objects")
    assert names == (None if form.startswith("voc") else ["dark", "light"])


def test_a_changed_annotation_file_is_read_again(tmp_path: Path) -> None:
    recipe = recipe_of(**voc_side_by_side(tmp_path / "set"))
    before = load_rows(recipe)["train"]
    write_voc(tmp_path / "set/train/1.png", tmp_path / "set/train/1.xml", 2)
    after = load_rows(recipe)["train"]
    assert before[0]["objects"] != after[0]["objects"] == after[1]["objects"]
    assert before.sha256 != after.sha256


def test_coco_images_that_are_added_later_are_found(tmp_path: Path) -> None:
    own = tmp_path / "own"
    tiny_detectors.write_coco(own, {"train": 2})
    (tmp_path / "another data set").mkdir()
    for picture in (own / "images").iterdir():  # the same names in a folder of another data set
        picture.rename(tmp_path / "another data set" / picture.name)
    recipe = recipe_of(path=str(own / "train.json"))
    with pytest.raises(LoraError, match="there is no file"):
        load_rows(recipe)
    (own / "images").rmdir()
    (tmp_path / "another data set").rename(own / "images")
    rows = load_rows(recipe)["train"]
    assert [Path(row["image"]["path"]).parent for row in rows] == [own / "images"] * 2


def write_boxes(root: Path, split: str, boxes: list[str], difficult: str = "0") -> None:
    """Write an image of 40 x 30 pixels for each box, with an XML file next to it."""
    for i, box in enumerate(boxes):
        corners = (f"<{k}>{n}</{k}>" for k, n in zip(CORNERS, box.split(), strict=True))
        marked = f"<difficult>{difficult}</difficult><bndbox>{''.join(corners)}</bndbox>"
        put(root / split / f"{i}.xml", XML.format(marked))
        Image.new("RGB", (40, 30)).save(root / split / f"{i}.png")


CORNERS = ("xmin", "ymin", "xmax", "ymax")


@pytest.mark.parametrize(
    ("others", "first"),
    [
        (["0 7 9 9"], 0), (["7 0.0 9 9"], 0), (["1 1 9 9"], 1), ([], 1),
        (["0 7 9 9", "1 8 9 9", "3 1 8 8"], 1), (["0 0 9 9", "1 8 9 9"], 0),
    ],
)  # fmt: skip
def test_all_boxes_of_a_folder_use_the_same_first_pixel(
    others: list[str], first: int, tmp_path: Path
) -> None:
    write_boxes(tmp_path / "set", "train", ["5 6 20 21", *others])
    rows = load_rows(recipe_of(path=str(tmp_path / "set")))["train"]
    assert rows[0]["objects"]["bbox"] == [[5.0 - first, 6.0 - first, 20.0, 21.0]]
    # a new file shows that pixels start at 0, so the cached rows are read again
    write_boxes(tmp_path / "set", "train", ["5 6 20 21", *others, *["0 0 9 9"] * 4])
    rows = load_rows(recipe_of(path=str(tmp_path / "set")))["train"]
    assert rows[0]["objects"]["bbox"] == [[5.0, 6.0, 20.0, 21.0]]


@pytest.mark.parametrize(("written", "mark"), [("1", 1), (" 0 ", 0), ("", 0)])
def test_difficult_objects_of_voc_are_ignored(written: str, mark: int, tmp_path: Path) -> None:
    write_boxes(tmp_path / "set", "train", ["5 6 20 21"], written)
    rows = load_rows(recipe_of(path=str(tmp_path / "set")))["train"]
    assert read_objects(rows[0]["objects"], (40, 30)).crowd.tolist() == [bool(mark)]


@pytest.mark.parametrize(
    ("picture", "category"), [("1", "7"), (1.0, 7.0), ("1", 7), (1, "7"), ("a", 7)]
)
def test_coco_ids_may_be_text_or_numbers(picture: Any, category: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    whole = "a" if picture == "a" else 1
    content: Json = {
        "images": [{"id": whole, "file_name": "a.png"}], "categories": [{"id": 7, "name": "cat"}],
        "annotations": [{"image_id": picture, "category_id": category, "bbox": [1, 1, 4, 4]}],
    }  # fmt: skip
    for _ in range(2):
        put(tmp_path / "train.json", json.dumps(content))
        rows = load_rows(recipe_of(train=str(tmp_path / "train.json")))["train"]
        assert rows[0]["objects"]["category"] == ["cat"]
        # the reverse
        image, annotation = content["images"][0], content["annotations"][0]
        image["id"], annotation["image_id"] = annotation["image_id"], image["id"]


def test_a_polygon_is_read_as_its_bounding_box(tmp_path: Path) -> None:
    yolo(tmp_path)
    put(tmp_path / "labels/train/1.txt", "1 0.25 0.5 0.5 0.75 0.5 0.5\n")
    rows = load_rows(recipe_of(path=str(tmp_path / "data.yaml")))["train"]
    assert rows[0]["objects"]["bbox"] == [[0.375, 0.625, 0.25, 0.25]]


def test_the_test_split_of_a_yaml_file_can_be_evaluated(tmp_path: Path) -> None:
    """Read a file as `lora eval --input data.yaml` does."""
    yolo(tmp_path)
    recipe = recipe_of(path=str(tmp_path / "data.yaml"))
    with pytest.raises(LoraError, match=r"data\.yaml has no split `test`"):
        load_rows(with_test_file(recipe, tmp_path / "data.yaml"), ["test"])
    put(tmp_path / "data.yaml", "train: images/train\ntest: images/val\nnames: [dark, light]\n")
    rows = load_rows(with_test_file(recipe, tmp_path / "data.yaml"), ["test"])["test"]
    expected = load_rows(recipe_of(test=str(tmp_path / "images" / "val"), path=str(tmp_path)))[
        "test"
    ]
    assert [row["objects"] for row in rows] == [row["objects"] for row in expected]
    assert len(rows) == 2


@pytest.mark.parametrize("number", ["1.0", "1.000000e+00"])
def test_a_yolo_label_may_be_formatted_by_numpy(number: str, tmp_path: Path) -> None:
    yolo(tmp_path)
    put(tmp_path / "labels/train/1.txt", f"{number} 0.5 0.5 0.5 0.5\n")
    rows = load_rows(recipe_of(path=str(tmp_path / "data.yaml")))["train"]
    assert rows[0]["objects"]["category"] == ["light"]


def test_a_blank_line_in_a_yolo_names_file_counts_as_an_index(tmp_path: Path) -> None:
    data = yolo_by_folders(tmp_path)
    put(tmp_path / "classes.txt", "dark\n\nlight\n\n")
    for file in tmp_path.rglob("labels/*.txt"):
        put(file, "2 0.5 0.5 0.5 0.5\n")
    row = load_rows(recipe_of(**data))["train"][0]
    assert row["objects"]["category"] == ["light"]


def test_yolo_paths_may_be_windows_paths(tmp_path: Path) -> None:
    yolo(tmp_path)
    put(tmp_path / "train.txt", "images\\train\\1.png\nimages\\train\\2.png\n")
    put(tmp_path / "data.yaml", "train: train.txt\nval: images\\val\nnames: [dark, light]\n")
    result = load_rows(recipe_of(path=str(tmp_path / "data.yaml"), validation="validation"))
    assert [len(rows) for rows in result.values()] == [2, 2]


def test_a_table_next_to_annotated_images_is_ignored(tmp_path: Path) -> None:
    """Label Studio writes `notes.json` next to the folders of YOLO."""
    data = yolo_by_folders(tmp_path)
    put(tmp_path / "notes.json", '{"categories": [{"id": 0, "name": "dark"}], "info": {}}')
    assert len(load_rows(recipe_of(**data))["train"]) == 4
    put(tmp_path / "train" / "metadata.jsonl", '{"file_name": "images/1.png", "objects": []}')
    assert len(load_rows(recipe_of(path=str(tmp_path / "train")))["train"]) == 1


def test_a_voc_data_set_without_splits_is_all_train(tmp_path: Path) -> None:
    """CVAT writes such a list."""
    voc(tmp_path)
    for file in (tmp_path / "ImageSets" / "Main").iterdir():
        file.unlink()
    put(tmp_path / "ImageSets/Main/default.txt", "1\n3\n")
    rows = load_rows(recipe_of(path=str(tmp_path)))["train"]
    assert [rows.place(i) for i in range(len(rows))] == ["JPEGImages/1.png", "JPEGImages/3.png"]
    with pytest.raises(LoraError, match="has no split `validation`"):
        load_rows(recipe_of(path=str(tmp_path), validation="validation"))


@pytest.mark.parametrize("encoding", ["gbk", "utf-8", "utf-16", "latin-1"])
def test_xml_is_read_in_its_declared_encoding(encoding: str, tmp_path: Path) -> None:
    data = voc_side_by_side(tmp_path / "set")
    name = "café" if encoding == "latin-1" else "猫"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    text = XML.format(box).replace("dark", name)
    content = f'<?xml version="1.0" encoding="{encoding}"?>\n{text}'.encode(encoding)
    (tmp_path / "set" / "train" / "1.xml").write_bytes(content)
    row = load_rows(recipe_of(**data))["train"][0]
    assert row["objects"]["category"] == [name]


@pytest.mark.parametrize(
    ("bbox", "outline", "box"),
    [
        ({}, [[9, 2, 11, 4, 10, 12], [1, 3, 2, 3, 2, 4]], [1, 2, 10, 10]),
        ({"bbox": []}, [[9, 2, 11, 4, 10, 12]], [9, 2, 2, 10]),
        ({"bbox": [1, 2, 3, 4]}, [[9, 2, 11, 4, 10, 12]], [1, 2, 3, 4]),
        ({}, [[9, 2, 11]], None), ({}, {"counts": "x", "size": [9, 9]}, None), ({}, [], None),
    ],
)  # fmt: skip
def test_a_coco_polygon_gives_its_bounding_box(
    bbox: Json, outline: Any, box: list[int] | None, tmp_path: Path
) -> None:
    draw(tmp_path / "1.png", 1)
    content = {
        "images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": outline, **bbox}],
    }  # fmt: skip
    put(tmp_path / "train.json", json.dumps(content))
    recipe = recipe_of(train=str(tmp_path / "train.json"))
    if box is None:
        with pytest.raises(
            LoraError, match="an annotation of `cat` has no `bbox`, and no outline or mask"
        ):
            load_rows(recipe)
    else:
        assert load_rows(recipe)["train"][0]["objects"]["bbox"] == [box]


XML = "<annotation><object><name>dark</name>{}</object></annotation>"
WRONG = {
    "xml that is cut off": ("train/1.xml", "<annotation>", "1.xml: not valid XML"),
    "no box": ("train/1.xml", XML.format(""), "object 1 has no name or no box"),
    "an encoding that there is not": (
        "train/1.xml", '<?xml version="1.0" encoding="x-none"?><annotation/>', "not valid XML"
    ),
    "XML of something else": (
        "train/1.xml", "<a xmlns='b'><object/></a>", "no annotation of Pascal VOC: .*`{b}a`"
    ),
    "no number": ("train/1.xml", XML.format("<bndbox><xmin>x</xmin></bndbox>"), "lacks a number"),
    "no picture": ("train/99.xml", XML.format(""), "there is no picture `99` for its boxes"),
    "no xml": ("train/1.xml", None, "there is no `1.xml` with its boxes"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_an_invalid_voc_file_is_named(wrong: str, tmp_path: Path) -> None:
    name, text, message = WRONG[wrong]
    data = voc_side_by_side(tmp_path / "set")
    if text is None:
        (tmp_path / "set" / name).unlink()
    else:
        put(tmp_path / "set" / name, text)
    with pytest.raises(LoraError, match=message):
        load_rows(recipe_of(**data))
    rows = load_rows(recipe_of(**data, on_bad_row="skip"))["train"]
    assert len(rows.skipped) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.5", "line 1 has 3 numbers behind the label"),
        ("dark 0.5 0.5 0.5 0.5", "does not begin with the number of a label"),
        ("0 0.5 x 0.5 0.5", "is not a number"),
        ("\n7 0.5 0.5 0.5 0.5", "line 2 is of label 7, and the names are of 0 to 1"),
    ],
)
def test_an_invalid_yolo_line_is_reported_by_its_number(
    text: str, message: str, tmp_path: Path
) -> None:
    data = yolo(tmp_path)
    put(tmp_path / "labels/train/1.txt", text)
    with pytest.raises(LoraError, match=message):
        load_rows(recipe_of(**data))


def test_a_missing_split_of_a_yaml_file_is_an_error(tmp_path: Path) -> None:
    yolo(tmp_path)
    put(tmp_path / "data.yaml", "train: nowhere\nnames: [dark, light]\n")
    with pytest.raises(LoraError, match="`train: nowhere` is not there"):
        load_rows(recipe_of(path=str(tmp_path / "data.yaml")))


@pytest.mark.parametrize("as_list", [False, True])
def test_categories_of_a_hub_data_set_have_names(as_list: bool, tmp_path: Path) -> None:
    label, box = (
        datasets.ClassLabel(names=["dark", "light"]),
        datasets.List(datasets.Value("float32")),
    )
    inner: Any = {"bbox": box, "category": label}
    many = {"bbox": [[1, 2, 3, 4]], "category": [1]}
    value: Any = [{"bbox": [1, 2, 3, 4], "category": 1}] if as_list else many
    kind = datasets.List(inner) if as_list else {k: datasets.List(v) for k, v in inner.items()}
    features = datasets.Features({"image": datasets.Image(), "objects": kind})
    image = tiny_detectors.scene(1)[0]
    rows = datasets.Dataset.from_dict({"image": [image], "objects": [value]}, features=features)
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    result = load_rows(recipe_of(name=str(tmp_path / "set")))["train"]
    assert result.label_names["objects"] == ["dark", "light"]
    read = read_objects(result[0]["objects"], image.size)
    assert read.boxes.tolist() == [[1, 2, 4, 6]]
    assert read.categories == [1]


@pytest.mark.parametrize("form", ["voc", "yolo", "coco", "yolo by folders"])
def test_init_drafts_a_recipe_for_each_format(form: str, tmp_path: Path) -> None:
    data = FORMS[form](tmp_path / "set")
    source = Path(data.get("path", data.get("train", "")))
    base = tiny_detectors.save("yolos", tmp_path / "base")
    target = tmp_path / "recipe.yaml"
    draft = draft_recipe(source, str(base), target)
    assert not any("`objects`" in said for _, said in draft.findings)  # as left out
    write_recipe(target, draft.text(), {})
    recipe = load_recipe(target)
    assert recipe.task.model_dump(exclude_defaults=True) == {
        "type": "object_detection", "labels": ["dark", "light"], "image_size": 64,
    }  # fmt: skip
    rows = load_rows(recipe)
    assert sum(map(len, rows.values())) == 6


@pytest.mark.parametrize(
    ("train", "others"),
    [
        ("train.json", {"validation": "val.json"}),
        (
            "instances_train2017.json",
            {"validation": "instances_val2017.json", "test": "instances_test2017.json"},
        ),
        (
            "train/_annotations.coco.json",
            {"validation": "valid/_annotations.coco.json", "test": "test/_annotations.coco.json"},
        ),
    ],
)
def test_init_finds_the_coco_files_of_other_splits(
    train: str, others: Json, tmp_path: Path
) -> None:
    tiny_detectors.save("yolos", tmp_path / "base")
    for i, name in enumerate((train, *others.values())):
        made = tiny_detectors.write_coco(tmp_path / f"made{i}", {"some": 4}) / "some.json"
        put(tmp_path / "set" / name, made.read_text())
    draft = draft_recipe(tmp_path / "set" / train, str(tmp_path / "base"), tmp_path / "r.yaml")
    result = {k: v for k, v in draft.values["data"].items() if isinstance(v, str) and k != "path"}
    assert result == {split: f"set/{name}" for split, name in others.items()}


def test_init_says_why_a_coco_file_of_another_split_is_not_used(tmp_path: Path) -> None:
    tiny_detectors.save("yolos", tmp_path / "base")
    file = tiny_detectors.write_coco(tmp_path / "set", {"train": 4}) / "train.json"
    content = {**json.loads(file.read_text()), "annotations": []}
    other = json.dumps({**content, "categories": [{"id": 3, "name": "bird"}]})
    for text, reason in ((other, "train has no label `bird`"), ("{}", "it has no boxes")):
        put(tmp_path / "set" / "val.json", text)
        draft = draft_recipe(file, str(tmp_path / "base"), tmp_path / "r.yaml")
        assert draft.values["data"]["validation"]["from"] == "train"
        said = " ".join(draft.why.values())
        assert f"val.json next to the file is not used: {reason}" in said


# -------------------------------------------------------------------------------- numbered labels


@pytest.mark.parametrize(
    ("names", "line", "label"),
    [
        # text keys, which sort differently as text: 0, 1, 10, 2
        ("{" + ", ".join(f"'{i}': n{i}" for i in range(11)) + "}", "10 .5 .5 .2 .2", "n10"),
        ("{1: cat, 2: dog}", "1 .5 .5 .2 .2", "cat"),
        ("{0: cat, 3: dog}", "3 .5 .5 .2 .2", "dog"),
        ("[yes, no]", "1 .5 .5 .2 .2", "no"),
        ("[01, 1e3]", "0 .5 .5 .2 .2", "01"),
    ],
)
def test_a_yolo_index_gives_the_label_name(
    names: str, line: str, label: str, tmp_path: Path
) -> None:
    data = yolo(tmp_path)
    put(tmp_path / "data.yaml", f"train: images/train\nval: images/val\nnames: {names}\n")
    for file in (tmp_path / "labels").rglob("*.txt"):
        put(file, line)
    rows = load_rows(recipe_of(**data))["train"]
    assert {c for row in rows for c in row["objects"]["category"]} == {label}


def test_a_yolo_index_without_a_name_is_an_error(tmp_path: Path) -> None:
    data = yolo(tmp_path)
    put(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: {0: cat, 3: dog}\n")
    put(tmp_path / "labels/train/1.txt", "1 .5 .5 .2 .2")
    with pytest.raises(LoraError, match="line 1 is of label 1, and the names are of 0, 3"):
        load_rows(recipe_of(**data))


def test_two_different_names_files_are_an_error(tmp_path: Path) -> None:
    data = yolo(tmp_path)
    put(tmp_path / "classes.txt", "light\ndark\n")
    message = "label 0 is `light` in classes.txt and `dark` in data.yaml"
    with pytest.raises(LoraError, match=message):
        load_rows(recipe_of(**data))
    put(tmp_path / "classes.txt", "dark\nlight\n")
    load_rows(recipe_of(**data))


def test_rows_are_read_again_if_the_names_change_their_indices(tmp_path: Path) -> None:
    data = yolo(tmp_path)
    label = "train: images/train\nval: images/val\nnames: "
    for file in (tmp_path / "labels").rglob("*.txt"):
        put(file, "1 .5 .5 .2 .2")
    for names, result in (("[cat, dog]", "dog"), ("{1: cat, 2: dog}", "cat")):
        put(tmp_path / "data.yaml", label + names)
        _labels_in.cache_clear()  # as in a new process
        row = load_rows(recipe_of(**data))["train"][0]
        assert row["objects"]["category"] == [result]


@pytest.mark.parametrize("n_points", [2, 3])
def test_key_points_after_a_box_are_not_a_polygon(n_points: int, tmp_path: Path) -> None:
    data = yolo(tmp_path)
    put(tmp_path / "labels/train/1.txt", "1 .5 .5 .2 .4" + " .1 .9" * n_points)
    label = "train: images/train\nval: images/val\nnames: [dark, light]\n"
    put(tmp_path / "data.yaml", f"{label}kpt_shape: [{n_points}, 2]\n")
    row = load_rows(recipe_of(**data))["train"][0]
    assert row["objects"]["bbox"] == [[0.5, 0.5, 0.2, 0.4]]


def to_parquet(file: Path, names: list[str] | None, value: Any, kind: str) -> None:
    """Write a row with one label, in a label column or inside objects."""
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    number = names.index(value) if names else value
    box = datasets.List(datasets.List(datasets.Value("float32")))
    if kind == "label":
        features: Json = {"text": datasets.Value("string"), "label": label}
        row: Json = {"text": f"a text of {file.stem}", "label": number}
    else:
        features = {
            "image": datasets.Image(),
            "objects": {"bbox": box, "category": datasets.List(label)},
        }
        picture = tiny_detectors.scene(len(file.stem))[0]
        row = {"image": picture, "objects": {"bbox": [[1, 2, 3, 4]], "category": [number]}}
    file.parent.mkdir(parents=True, exist_ok=True)
    of_type = datasets.Features(features)
    datasets.Dataset.from_list([row, row], features=of_type).to_parquet(file)


@pytest.mark.parametrize("kind", ["label", "objects"])
def test_init_uses_the_label_names_of_a_parquet_file(kind: str, tmp_path: Path) -> None:
    """All names are listed in the order of their numbers, which index the model's outputs."""
    to_parquet(tmp_path / "train.parquet", ["b", "c", "a"], "c", kind)
    to_parquet(tmp_path / "other.parquet", ["b", "c", "a"], "a", kind)
    both = [tmp_path / f"{name}.parquet" for name in ("train", "other")]
    tables = [pq.read_table(file) for file in both]
    pq.write_table(pa.concat_tables(tables), tmp_path / "set.parquet")
    base = str(tiny_detectors.save("yolos", tmp_path / "base")) if kind == "objects" else "none"
    source, target = tmp_path / "set.parquet", tmp_path / "recipe.yaml"
    draft = draft_recipe(source, base, target)
    assert draft.values["task"]["labels"] == ["b", "c", "a"]


def recipe_for(kind: str, **data: Any) -> Recipe:
    task: Json = {"type": "object_detection"}
    if kind == "label":
        task = {"type": "sequence_classification", "text_column": "text", "label_column": "label"}
    return Recipe.model_validate({"model": {"name": "none"}, "task": task, "data": data})


@pytest.mark.parametrize("kind", ["label", "objects"])
def test_numbered_labels_get_the_names_in_the_parquet_file(kind: str, tmp_path: Path) -> None:
    to_parquet(tmp_path / "a.parquet", ["dog", "cat"], "cat", kind)
    to_parquet(tmp_path / "b.parquet", ["dog", "cat", "bird"], "bird", kind)
    files = {"train": str(tmp_path / "a.parquet"), "validation": str(tmp_path / "b.parquet")}
    rows = load_rows(recipe_for(kind, **files))
    assert rows["train"].label_names[kind] == ["dog", "cat"]
    assert rows["validation"].label_names[kind] == ["dog", "cat", "bird"]


@pytest.mark.parametrize("kind", ["label", "objects"])
def test_the_longest_list_of_names_of_a_split_is_used(kind: str, tmp_path: Path) -> None:
    to_parquet(tmp_path / "a.parquet", ["dog", "cat"], "cat", kind)
    to_parquet(tmp_path / "b.parquet", ["dog", "cat", "bird"], "bird", kind)
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    recipe = recipe_for(kind, path=str(tmp_path))
    for some in (files, files[::-1]):
        assert parquet_label_names(recipe, some) == {kind: ["dog", "cat", "bird"]}


@pytest.mark.parametrize(
    ("value", "is_number"),
    [
        (0, True), ([2, 1], True), ({"bbox": [[1, 2, 3, 4]], "category": [0]}, True),
        ([{"bbox": [1, 2, 3, 4], "category": 0}], True), ("1", False), (True, False), (None, False),
        (["a"], False), ([], False), ({"bbox": [[1, 2, 3, 4]], "category": ["a"]}, False),
        ({"bbox": [[1, 2, 3, 4]]}, False),
    ],
)  # fmt: skip
def test_cells_with_numbered_labels_are_recognised(value: Any, is_number: bool) -> None:
    assert holds_numbers(value) is is_number


@pytest.mark.parametrize("kind", ["label", "objects"])
@pytest.mark.parametrize("form", ["splits", "one split"])
def test_a_number_with_two_label_names_is_an_error(kind: str, form: str, tmp_path: Path) -> None:
    to_parquet(tmp_path / "a.parquet", ["dog", "cat"], "cat", kind)
    to_parquet(tmp_path / "b.parquet", ["cat", "dog"], "cat", kind)
    data = {"train": str(tmp_path / "a.parquet"), "validation": str(tmp_path / "b.parquet")}
    if form == "one split":
        data = {"path": str(tmp_path), "train": "train"}
    with pytest.raises(LoraError, match=f"label 0 of column `{kind}` is `cat` here, and `dog` in"):
        load_rows(recipe_for(kind, **data))


@pytest.mark.parametrize("kind", ["label", "objects"])
def test_sets_with_different_numbering_are_mixed_by_name(kind: str, tmp_path: Path) -> None:
    to_parquet(tmp_path / "a.parquet", ["dog", "cat"], "cat", kind)
    to_parquet(tmp_path / "b.parquet", ["cat", "dog"], "cat", kind)
    mix = {name: {"train": str(tmp_path / f"{name}.parquet")} for name in ("a", "b")}
    rows = load_rows(recipe_for(kind, mix=mix))["train"]
    labels = [row[kind]["category"][0] if kind == "objects" else row[kind] for row in rows]
    assert labels == ["cat"] * 4


# ----------------------------------------------------------------------- sizes and formats of boxes


@pytest.mark.parametrize("size", [(80, 60), ("80", "60"), (80.0, 60.0), (" 80 ", "60.0")])
@pytest.mark.parametrize("where", ["coco", "voc", "columns of a row"])
def test_a_size_other_than_the_image_s_is_an_error(
    size: tuple[Any, Any], where: str, tmp_path: Path
) -> None:
    draw(tmp_path / "a.png", 1)
    about = {"width": size[0], "height": size[1]}
    if where == "coco":
        box = {"image_id": 1, "bbox": [1, 1, 5, 5], "category_id": 1}
        content = {
            "images": [{"id": 1, "file_name": "a.png", **about}], "annotations": [box],
            "categories": [{"id": 1, "name": "cat"}],
        }  # fmt: skip
        put(tmp_path / "train.json", json.dumps(content))
        data = {"train": str(tmp_path / "train.json")}
    elif where == "voc":
        corners = "<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax>"
        inside = f"<object><name>cat</name><bndbox>{corners}</bndbox></object>"
        size_of = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        put(tmp_path / "a.xml", f"<annotation>{size_of}{inside}</annotation>")
        data = {"path": str(tmp_path)}
    else:
        objects = {"bbox": [[1, 1, 5, 5]], "category": ["cat"]}
        put(tmp_path / "a.jsonl", json.dumps({"image": "a.png", "objects": objects, **about}))
        data = {"train": str(tmp_path / "a.jsonl")}
    task = build_task(recipe_of(**data))
    row = load_rows(task.recipe)["train"][0]
    assert "of a picture of 80 x 60 pixels, and the file has 37 x 29" in task.target_error(row)


@pytest.mark.parametrize(
    ("box", "form", "hint"),
    [
        ([20, 10, 35, 25], "xywh", "or is it `task.box_format: xyxy`"),
        ([20, 10, 15, 5], "xyxy", "or is it `task.box_format: xywh`"),
        ([0.5, 0.5, 0.75, 0.9], "relative_xywh", "or is it `task.box_format: relative_xyxy`"),
        ([30, 20, 20, 20], "xywh", "pixels by 14: `--set task.clip_boxes=true` cuts such boxes"),
    ],
)
def test_an_invalid_box_suggests_a_format_in_which_it_is_valid(
    box: list[float], form: str, hint: str
) -> None:
    with pytest.raises(BoxError, match=re.escape(hint)):
        read_objects([{"bbox": box, "label": "cat"}], (36, 28), form)


def test_the_box_format_of_an_annotation_file_cannot_be_set() -> None:
    value = {"bbox": [[20, 10, 35, 25]], "category": ["cat"], "box_format": "xywh"}
    with pytest.raises(BoxError, match="are these two corners") as raised:
        read_objects(value, (36, 28), "xyxy")
    assert "task.box_format" not in str(raised.value)


def test_clipped_boxes_are_tried_in_other_formats() -> None:
    size = (100, 50)
    boxes = [[60, 20, 90, 40], [5, 5, 20, 20], [50, 10, 95, 45]]
    known = [([{"bbox": box, "label": "cat"}], size) for box in boxes]
    assert better_format(known, "xywh") == ("xyxy", 2)
    assert better_format(known, "xyxy") is None
    truly_over = [([{"bbox": [95, 20, 20, 10], "label": "cat"}], size)]
    assert better_format(truly_over, "xywh") is None


def test_a_blank_crowd_flag_is_false() -> None:
    read = read_objects([{"bbox": [1, 1, 5, 5], "label": "cat", "iscrowd": None}], (36, 28))
    assert read.crowd.tolist() == [False]


@given(
    mask=st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(
        lambda size: arrays(np.uint8, size, elements=st.integers(0, 1))
    ),
    in_letters=st.booleans(),
)
def test_the_box_of_a_coco_mask_equals_that_of_pycocotools(
    mask: np.ndarray[Any, np.dtype[np.uint8]], in_letters: bool
) -> None:
    reference = coco_masks.encode(np.asfortranarray(mask))
    counts: Any = reference["counts"].decode()
    if not in_letters:
        flat = mask.flatten(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = [int(n) for n in np.diff([0, *ends, len(flat)])]
        counts = [0, *counts] if flat[0] else counts
    box = _box_of_mask({"size": list(mask.shape), "counts": counts})
    assert box == (coco_masks.toBbox(reference).astype(int).tolist() if mask.any() else None)


@pytest.mark.parametrize(
    "mask",
    [
        None, [], {"size": [2, 2]}, {"size": [2], "counts": [4]}, {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": [-1, 5]}, {"size": [2, 2], "counts": "04é"},
        {"size": ["2", 2], "counts": [0, 4]},
    ],
)  # fmt: skip
def test_an_invalid_mask_has_no_box(mask: Any) -> None:
    assert _box_of_mask(mask) is None


@pytest.mark.parametrize("above", [False, True])
def test_coco_images_in_several_folders_are_found(above: bool, tmp_path: Path) -> None:
    root = tiny_detectors.write_coco(tmp_path / "set", {"all": 6})
    content = json.loads((root / "all.json").read_text())
    names = [one["file_name"] for one in content["images"]]
    result = {Path(name).name: next(root.rglob(Path(name).name)) for name in names}
    for n, one in enumerate(content["images"]):
        one["file_name"] = Path(one["file_name"]).name
        folder = root / "images" / ("train2014" if n < 4 else "val2014")
        folder.mkdir(parents=True, exist_ok=True)
        result[one["file_name"]].rename(folder / one["file_name"])
    file = root / "annotations" / "all.json" if above else root / "images" / "all.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    rows = list(read_coco(file, "image", "objects"))
    assert not any(row.error for row in rows)
    places = [Path(row.columns["image"]["path"]) for row in rows if row.columns]
    assert [place.parent.name for place in places] == ["train2014"] * 4 + ["val2014"] * 2
    assert all(place.is_file() for place in places)
    (root / "images" / "other").mkdir()
    shutil.copy(
        places[5], root / "images" / "other"
    )  # an image in the first folder is not ambiguous
    *good, bad = read_coco(file, "image", "objects")
    assert not any(row.error for row in good)
    assert "a picture of this name is in" in bad.error
