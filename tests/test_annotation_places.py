"""Where the annotation file of an image is searched for, and which files belong to a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_cli.data import yolo
from lora_cli.data.annotated_folder import annotated_files, annotation_file
from lora_cli.data.yolo import labels_for
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe

RECIPE = Recipe.model_validate(
    {"model": {"name": "none"}, "task": {"type": "object_detection"}, "data": {"path": "a"}}
)


def put(*files: Path, text: str = "") -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("picture", "annotation", "result"),
    [
        # next to the image
        ("a.png", "a.xml", True), ("a.png", "a.txt", True), ("a.png", "b.txt", False),
        # next to one of the three folders above the image, with the subfolders below it
        ("JPEGImages/a.jpg", "Annotations/a.xml", True),
        ("JPEGImages/a.jpg", "annotations/a.xml", True), ("pictures/a.jpg", "xmls/a.xml", True),
        ("pictures/a.jpg", "labels/a.xml", True),
        ("images/train/a.jpg", "Annotations/train/a.xml", True),
        ("images/train/x/a.jpg", "Annotations/train/x/a.xml", True),
        ("images/train/x/y/a.jpg", "Annotations/train/x/y/a.xml", False),
        # two kinds of folders may have no such subfolders
        ("images/train/a.jpg", "Annotations/a.xml", True),
        ("images/train/a.jpg", "annotations/a.xml", True),
        ("images/train/a.jpg", "xmls/a.xml", False), ("images/train/a.jpg", "labels/a.xml", False),
        # YOLO's are in `labels`, and the images in `images`
        ("images/a.jpg", "labels/a.txt", True), ("images/train/a.jpg", "labels/train/a.txt", True),
        ("images/x/y/a.jpg", "labels/x/y/a.txt", True),
        ("images/x/y/z/a.jpg", "labels/x/y/z/a.txt", False),
        ("pictures/a.jpg", "labels/a.txt", False), ("images/train/a.jpg", "labels/a.txt", False),
    ],
)  # fmt: skip
def test_annotations_are_searched_for_next_to_the_folders_of_an_image(
    picture: str, annotation: str, result: bool, tmp_path: Path
) -> None:
    top = tmp_path / "one" / "two" / "three" / "four"
    put(top / picture, top / annotation)
    assert annotation_file(top / picture) == (top / annotation if result else None)


def test_a_file_next_to_the_image_comes_first(tmp_path: Path) -> None:
    picture = tmp_path / "images" / "a.jpg"
    files = [picture.with_suffix(".xml"), picture.with_suffix(".txt"),
             tmp_path / "Annotations" / "a.xml", tmp_path / "labels" / "a.xml",
             tmp_path / "labels" / "a.txt"]  # fmt: skip
    put(picture, *files)
    for file in files:
        assert annotation_file(picture) == file
        file.unlink()
    assert annotation_file(picture) is None


def test_label_names_are_searched_for_in_four_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c" / "d" / "e"
    picture = folder / "p.jpg"
    put(picture)
    for i, above in enumerate(picture.parents[:5]):
        yolo._labels_in.cache_clear()
        put(above / "classes.txt", text="cat\n\n dog \n")
        expected = {0: "cat", 2: "dog"} if i < 4 else {}
        assert labels_for(picture).names == expected
        (above / "classes.txt").unlink()
    yolo._labels_in.cache_clear()


@pytest.mark.parametrize(
    ("text", "names", "points"),
    [
        ("names: [cat, dog]", {0: "cat", 1: "dog"}, 0),
        ("names: {10: x, 2: ' y '}", {2: "y", 10: "x"}, 0),
        ("names: {'1': x}\nkpt_shape: [17, 3]", {1: "x"}, 51),
        ("names: [a]\nkpt_shape: [17, x]", {0: "a"}, 0), ("names: [a]\nkpt_shape: 5", {0: "a"}, 0),
        ("names: 3", {}, 0), ("other: 3", {}, 0), ("- a", {}, 0),
    ],
)  # fmt: skip
def test_a_yaml_file_has_label_names_and_a_number_of_key_points(
    text: str, names: dict[int, str], points: int, tmp_path: Path
) -> None:
    yolo._labels_in.cache_clear()
    put(tmp_path / "data.yaml", text=text)
    result = yolo._labels_in(tmp_path)
    assert (result.names, result.n_points) == (names, points)
    assert list(result.names) == sorted(result.names)
    yolo._labels_in.cache_clear()


def test_two_names_files_must_agree(tmp_path: Path) -> None:
    put(tmp_path / "classes.txt", text="cat\ndog")
    put(tmp_path / "data.yaml", text="names: [cat, dog]\nkpt_shape: [2, 2]")
    yolo._labels_in.cache_clear()
    assert yolo._labels_in(tmp_path).n_points == 4  # only one of the files has it
    for text, said in (
        ("names: [cat, cow]", "label 1 is `dog` in classes.txt and `cow` in data.yaml"),
        ("names: [cat]", "label 1 is `dog` in classes.txt and `nothing` in data.yaml"),
        ("names: [cat, dog, x]", "label 2 is `nothing` in classes.txt and `x` in data.yaml"),
    ):
        yolo._labels_in.cache_clear()
        put(tmp_path / "data.yaml", text=text)
        with pytest.raises(LoraError) as caught:
            yolo._labels_in(tmp_path)
        assert caught.value.problems[0].what == said
    yolo._labels_in.cache_clear()


# ------------------------------------------------------------------------------------------ splits


def names_in(result: Any) -> Any:
    return None if result is None else [file.name for file in result]


def test_voc_image_lists_define_the_splits(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "JPEGImages" / f"{i}.jpg", tmp_path / "Annotations" / f"{i}.xml")
    lists = tmp_path / "ImageSets" / "Main"
    put(lists / "train.txt", text="0\n1\n")
    put(lists / "val.txt", text="2\n")
    put(lists / "mine.txt", text="3\n")
    for split, expected in (
        ("train", ["0.jpg", "1.jpg"]), ("validation", ["2.jpg"]), ("test", []),
        ("mine", ["3.jpg"]), ("other", []),
    ):  # fmt: skip
        assert names_in(annotated_files(tmp_path, split, RECIPE)) == expected
    assert names_in(annotated_files(lists / "mine.txt", "train", RECIPE)) == ["3.jpg"]
    # a text file elsewhere is not a list, and a folder without lists or names is another format
    put(tmp_path / "more" / "train.txt", text="0\n")
    assert annotated_files(tmp_path / "more" / "train.txt", "train", RECIPE) is None
    assert annotated_files(tmp_path / "more", "train", RECIPE) is None
    assert annotated_files(tmp_path / "nowhere", "train", RECIPE) is None
