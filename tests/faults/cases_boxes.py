"""Error cases of object detection: annotation files, boxes in rows, and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import tiny_detectors
import tiny_pictures
from cases import CASES, Case, case
from world import Printed, World

AREA = "Pictures with boxes"
TASK = {"type": "object_detection", "max_length": ...}


def recipe_of(world: World, **sections: Any) -> str:
    """Write a recipe for object detection, and a model, to the world's folder."""
    folder = world.folder / "yolos"
    if not folder.exists():
        tiny_detectors.save("yolos", folder)
    task = {**TASK, **sections.pop("task", {})}
    data = sections.pop("data", {"path": "data/train.json"})
    return world.recipe(model={"name": "./yolos"}, task=task, data=data, **sections)


def coco(world: World, **changes: Any) -> Path:
    """Write a COCO file with changes, and return it; `...` removes a key."""
    file = tiny_detectors.write_coco(world.folder / "data", {"train": 3}) / "train.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: v for key, v in content.items() if v is not ...}))
    return file


def _coco(**changes: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        coco(world, **changes)
        return world.lora("validate", recipe_of(world))

    return run


CATS = [{"id": 3, "name": "dark"}, {"id": 7, "name": "dark"}]
for _name, _changes in {
    "a COCO file without boxes": {"annotations": ...},
    "a category without a name": {"categories": [{"id": 3}]},
    "two categories of one name": {"categories": CATS},
    "a COCO file of pictures that are not there": {
        "images": [{"id": 1, "file_name": "gone.png"}, {"id": 1, "file_name": "1.png"}, {"id": 5}]
    },
    "annotations of unknown categories": {"categories": [{"id": 3, "name": "dark"}]},
    "no object at all": {"annotations": []},
    "no object that is trained": {
        "annotations": [{"image_id": 101, "bbox": [1, 1, 5, 5], "category_id": 3, "iscrowd": 1}],
        "categories": [{"id": 3, "name": "dark"}],
    },
}.items():
    CASES.append(Case(AREA, _name, _coco(**_changes)))


@case(AREA, "a COCO file that is cut off")
def _(world: World) -> Printed:
    file = coco(world)
    file.write_text(file.read_text()[:-30])
    return world.lora("validate", recipe_of(world))


def _rows(*objects: Any, size: str = "30 x 20", **task: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        width, height = map(int, size.split(" x "))
        tiny_pictures.picture(1, width=width, height=height).save(world.folder / "a.png")
        rows = [{"image": "a.png", "objects": value} for value in objects]
        world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return world.lora("validate", recipe_of(world, data={"path": "rows.jsonl"}, task=task))

    return run


def box(*numbers: float, category: Any = "dark", **more: Any) -> dict[str, Any]:
    return {"bbox": [list(numbers)], "category": [category], **more}


for _name, _run in {
    "boxes outside, empty, swapped": _rows(
        box(40, 4, 5, 5), box(25, 4, 9, 5), box(4, 4, 0, 5), box(9, 9, -4, 5)
    ),
    "corners that are swapped": _rows(box(9, 4, 2, 8), box_format="xyxy"),
    "boxes that are no numbers": _rows(
        box(float("nan"), 4, 5, 5), box(4, 4, 5), {"bbox": [["a", 1, 2, 3]], "category": ["dark"]}
    ),
    "shares among pixels": _rows(box(0.1, 0.2, 0.3, 0.4)),
    "pixels among shares": _rows(box(10, 4, 5, 5), box_format="relative_cxcywh"),
    "cells that hold no objects": _rows(
        None, "dark", 3, [3], [{"bbox": [1, 2, 3, 4]}], {"category": []},
        {"bbox": 1, "category": []}, {"bbox": [[1, 2, 3, 4]], "category": []},
    ),
    "categories and crowds that are none": _rows(
        box(1, 2, 3, 4, category=None), box(1, 2, 3, 4, category={}),
        box(1, 2, 3, 4, iscrowd=[2]), box(1, 2, 3, 4, iscrowd=0),
    ),
    "boxes of a picture of another size": _rows(
        box(1, 2, 3, 4, size=[20, 30]), box(1, 2, 3, 4, size=[60, 40])
    ),
    "a category that is no label": _rows(
        *(box(1, 2, 3, 4, category=f"kind {i}") for i in range(12)), labels=["dark", "light"]
    ),
    "a number that is no position": _rows(
        box(1, 2, 3, 4, category=5), labels=["dark", "light"]
    ),
    "a label that is blank": _rows(box(1, 2, 3, 4), labels=["dark", " "]),
    "a label that appears twice": _rows(box(1, 2, 3, 4), labels=["dark", "dark"]),
    "a part of pictures that are not cropped": _rows(
        box(1, 2, 3, 4), augmentation={"smallest_crop": 0.5}
    ),
}.items():  # fmt: skip
    CASES.append(Case(AREA, _name, _run))


def _changed(name: str, **changes: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        coco(world)
        recipe = recipe_of(world)
        file = world.folder / "yolos" / name
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: v for key, v in content.items() if v is not ...}))
        return world.lora("validate", recipe)

    return run


@case(AREA, "a split that is not where YOLO's file says")
def _(world: World) -> Printed:
    world.write("data.yaml", "train: nowhere\nnames: [dark, light]\n")
    return world.lora("validate", recipe_of(world, data={"path": "data.yaml"}))


@case(AREA, "a split that YOLO's file does not name")
def _(world: World) -> Printed:
    world.write("data.yaml", "train: nowhere\nnames: [dark, light]\n")
    data = {"path": "data.yaml", "validation": "validation"}
    return world.lora("validate", recipe_of(world, data=data))


def _yolo(names: str, **others: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        tiny_pictures.picture(1, width=30, height=20).save(world.folder / "a.png")
        world.write("a.txt", "2 0.5 0.5 0.2 0.2\n")
        world.write("data.yaml", f"train: .\nnames: {names}\n")
        for name, text in others.items():
            world.write(f"{name}.txt", text)
        return world.lora("validate", recipe_of(world, data={"path": "data.yaml"}))

    return run


for _name, _run in {
    "YOLO's names that have no numbers": _yolo("{cat: 0, dog: 1}"),
    "a number of YOLO without a name": _yolo("{1: cat, 5: dog}"),
    "two files with YOLO's names": _yolo("[cat, dog]", classes="dog\ncat\n"),
}.items():
    CASES.append(Case(AREA, _name, _run))


@case(AREA, "two parquet files that number the labels differently")
def _(world: World) -> Printed:
    kinds = {"text": datasets.Value("string")}
    for name, labels in (("train", ["dog", "cat"]), ("test", ["cat", "dog"])):
        features = datasets.Features(kinds | {"label": datasets.ClassLabel(names=labels)})
        rows = datasets.Dataset.from_list([{"text": "a", "label": 0}] * 2, features=features)
        rows.to_parquet(world.folder / f"{name}.parquet")
    data = {"train": "train.parquet", "test": "test.parquet"}
    return world.lora("validate", world.recipe(data=data))


@case(AREA, "init for boxes without pictures")
def _(world: World) -> Printed:
    tiny_detectors.save("yolos", world.folder / "yolos")
    world.write("rows.jsonl", json.dumps({"name": "a", "objects": box(1, 2, 3, 4)}) + "\n")
    return world.lora("init", "rows.jsonl", "--model", "./yolos", "-o", "new.yaml")


@case(AREA, "init for boxes in columns of numbers")
def _(world: World) -> Printed:
    tiny_detectors.save("yolos", world.folder / "yolos")
    rows = ["1.jpg,cat,1,1,9,9", "2.jpg,dog,1,1,9,9"]
    world.write("rows.csv", "\n".join(["filename,class,xmin,ymin,xmax,ymax", *rows]))
    return world.lora("init", "rows.csv", "--model", "./yolos", "-o", "new.yaml")


@case(AREA, "init for boxes with a model that finds none")
def _(world: World) -> Printed:
    tiny_pictures.save("vit", world.folder / "vit")
    coco(world)
    return world.lora("init", "data/train.json", "--model", "./vit", "-o", "new.yaml")


def _streamed(**task: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        tiny_pictures.picture(1, width=30, height=20).save(world.folder / "a.png")
        rows = [{"image": "a.png", "objects": box(1, 2, 3, 4, category="cup")}]
        world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        data = {"path": "rows.jsonl", "streaming": True}
        train = {"max_steps": 1, "epochs": None}
        recipe = recipe_of(world, data=data, task=task, train=train)
        return world.lora("train", recipe, "-o", "out")

    return run


CASES.append(Case(AREA, "streamed rows without names of labels", _streamed()))
CASES.append(Case(AREA, "a streamed row with another label", _streamed(labels=["dark", "light"])))


PROCESSOR = "preprocessor_config.json"
for _name, _run in {
    "a processor that finds no objects": _changed(
        PROCESSOR, image_processor_type="ViTImageProcessor", size={"height": 32, "width": 32}
    ),
    "a processor of no known size": _changed(PROCESSOR, size={"shortest_edge": 24}),
    "YOLOS with auxiliary losses": _changed("config.json", auxiliary_loss=True),
    "a backbone of timm": _changed(
        "config.json", model_type="detr", use_timm_backbone=True, backbone="resnet50"
    ),
    "another detector": _changed("config.json", model_type="conditional_detr"),
}.items():
    CASES.append(Case(AREA, _name, _run))
