"""Faults of paths, pipes, devices and caches: what the system gives, or does not."""

from __future__ import annotations

from unittest import mock

import datasets
from cases import case
from world import Printed, World


@case("Recipes", "a device")
def _(world: World) -> Printed:
    return world.lora("validate", "/dev/zero")


@case("Recipes", "a path that is an address")
def _(world: World) -> Printed:
    return world.lora("validate", world.recipe(), "--set", "output_dir=file:///tmp/x")


@case("Recipes", "a path that is an address of the Hub")
def _(world: World) -> Printed:
    return world.lora("validate", world.recipe(model={"name": "https://huggingface.co/a/b"}))


@case("Targets", "layers the wrong way round")
def _(world: World) -> Printed:
    return world.lora("validate", world.recipe(adapter={"layers": "1-0"}))


@case("Arguments", "a path that holds a variable")
def _(world: World) -> Printed:
    with mock.patch.dict("os.environ", {"HOME": "/home/me"}):
        return world.lora("predict", "--adapter", "$HOME/out", "a film")


@case("Arguments", "a path that ends with a space")
def _(world: World) -> Printed:
    return world.lora("validate", "recipe.yaml ")


@case("Arguments", "a path of an unknown user")
def _(world: World) -> Printed:
    return world.lora("validate", "~no-such-user-here/recipe.yaml")


@case("Arguments", "a path with what cannot be seen")
def _(world: World) -> Printed:
    return world.lora("validate", "rec\u200bipe.yaml")


@case("Files and rows", "a cache that cannot be written to")
def _(world: World) -> Printed:
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", "/dev/null/cache"):
        return world.lora("validate", world.recipe(), "--data")


@case("Prediction", "a file of which no row can be answered")
def _(world: World) -> Printed:
    world.write("empty.jsonl", '{"text": ""}\n{"text": ""}\n')
    arguments = ("--input", "empty.jsonl", "--output", "out.jsonl")
    return world.lora("predict", "--adapter", world.trained(), *arguments)
