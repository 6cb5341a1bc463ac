"""Error cases of image classification: images, tables and folders of them, and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_pictures
from cases import CASES, Case, case
from world import Printed, World

AREA = "Pictures"
TASK = {"type": "image_classification", "max_length": ...}


def recipe_of(world: World, base: str = "vit", **sections: Any) -> str:
    """Write a recipe for image classification, and a model, to the world's folder."""
    folder = world.folder / base
    if not folder.exists():
        tiny_pictures.save("vit" if base == "vit" else base, folder)
    data = sections.pop("data", {"path": "pictures"})
    task = {**TASK, **sections.pop("task", {})}
    return world.recipe(model={"name": f"./{base}"}, task=task, data=data, **sections)


def draw(world: World, **splits: int) -> Path:
    return tiny_pictures.draw_folders(world.folder / "pictures", splits or {"train": 2})


def _broken(content: bytes) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        (draw(world) / "train" / "dark" / "odd.png").write_bytes(content)
        return world.lora("validate", recipe_of(world))

    return run


PNG = tiny_pictures.encoded(tiny_pictures.picture(1, width=90, height=90))
for _name, _content in {
    "no picture": b"a text",
    "an empty file": b"",
    "a picture that is cut off": PNG[:900],
}.items():
    CASES.append(Case(AREA, _name, _broken(_content)))


@case(AREA, "linear layers of a model of convolutions")
def _(world: World) -> Printed:
    draw(world)
    return world.lora(
        "validate", recipe_of(world, "resnet", adapter={"target_modules": "all-linear"})
    )


def _rows(text: str, name: str = "rows.csv") -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        draw(world)
        world.write(name, text)
        return world.lora("validate", recipe_of(world, data={"path": name}))

    return run


GOOD = "image,label\npictures/train/dark/0.png,dark\npictures/train/light/0.png,light\n"
CASES.append(
    Case(
        AREA,
        "files that are not there, and addresses",
        _rows(f"{GOOD}gone.png,dark\nhttps://example.org/a.png,dark\npictures,dark\n,dark\n"),
    )
)
CASES.append(
    Case(
        AREA,
        "values that are no paths",
        _rows('{"image": 3, "label": "dark"}\n{"image": null, "label": "dark"}\n', "rows.jsonl"),
    )
)


@case(AREA, "pictures without labels")
def _(world: World) -> Printed:
    for file in draw(world).rglob("*.png"):
        file.rename(world.folder / "pictures" / f"{file.parent.name}{file.name}")
    return world.lora("validate", recipe_of(world))


@case(AREA, "a part of pictures that are not cropped")
def _(world: World) -> Printed:
    draw(world)
    task = {"augmentation": {"smallest_crop": 0.5}}
    return world.lora("validate", recipe_of(world, task=task))


def _processor(**options: Any) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        draw(world)
        tiny_pictures.save("vit", world.folder / "vit", **options)
        return world.lora("validate", recipe_of(world))

    return run


CASES.append(
    Case(
        AREA,
        "a processor that makes tensors of any shape",
        _processor(image_processor_type="EfficientNetImageProcessor", size={"shortest_edge": 32}),
    )
)
CASES.append(Case(AREA, "a processor that fails", _processor(image_mean=[0.5, 0.5])))
CASES.append(Case(AREA, "a processor that makes tensors of another size than the model's",
                  _processor(size={"height": 48, "width": 48})))  # fmt: skip


@case(AREA, "a rank that groups do not divide")
def _(world: World) -> Printed:
    draw(world)
    adapter = {"rank": 3, "target_modules": ["depthwise_conv"]}
    return world.lora("validate", recipe_of(world, "efficientnet", adapter=adapter))


@case(AREA, "a model of five channels")
def _(world: World) -> Printed:
    draw(world)
    file = tiny_pictures.save("vit", world.folder / "vit") / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "num_channels": 5}), encoding="utf-8")
    return world.lora("validate", recipe_of(world))


@case(AREA, "a model of texts")
def _(world: World) -> Printed:
    draw(world)
    recipe = world.recipe(task=TASK, data={"path": "pictures"})
    return world.lora("validate", recipe)


def _init(*flags: str, **files: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        draw(world)
        tiny_pictures.save("vit", world.folder / "vit")
        for name, text in files.items():
            world.write(f"{name}.csv", text)
        return world.lora("init", *flags, "-o", "new.yaml")

    return run


VIT = ("--model", "./vit")
CASES.append(
    Case(
        AREA, "init: no pictures in a table", _init("rows.csv", *VIT, rows="text,label\na,b\nc,d\n")
    )
)
CASES.append(
    Case(AREA, "init: no label", _init("rows.csv", *VIT, rows=GOOD.replace("label", "note")))
)
CASES.append(
    Case(AREA, "init: no such label", _init("rows.csv", *VIT, "--label", "kind", rows=GOOD))
)
CASES.append(
    Case(AREA, "init: one label", _init("rows.csv", *VIT, rows=GOOD.replace(",light", ",dark")))
)
CASES.append(Case(AREA, "init: a model of texts", _init("pictures", "--model", "../bases/encoder")))


@case(AREA, "init: pictures without labels")
def _(world: World) -> Printed:
    (world.folder / "flat").mkdir()
    tiny_pictures.picture(1).save(world.folder / "flat" / "1.png")
    tiny_pictures.save("vit", world.folder / "vit")
    return world.lora("init", "flat", *VIT, "-o", "new.yaml")
