"""Faults of paths, pipes, devices and caches: what the system gives, or does not."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any
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


@case("Prediction", "of a blank text")
def _(world: World) -> Printed:
    return world.lora("predict", "--adapter", world.trained(), "a film", "   ")


@case("Prediction", "a file of which no row can be answered")
def _(world: World) -> Printed:
    world.write("empty.jsonl", '{"text": ""}\n{"text": ""}\n')
    arguments = ("--input", "empty.jsonl", "--output", "out.jsonl")
    return world.lora("predict", "--adapter", world.trained(), *arguments)


def _base(world: World, **config: Any) -> str:
    folder = world.folder / "base"
    shutil.copytree(world.bases / "encoder", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return "./base"


@case("Models", "more layers than any model has")
def _(world: World) -> Printed:
    name = _base(world, num_hidden_layers=10**7)
    return world.lora("validate", world.recipe(model={"name": name}))


@case("Models", "a pipe in the place of the configuration")
def _(world: World) -> Printed:
    name = _base(world)
    (world.folder / "base" / "config.json").unlink()
    os.mkfifo(world.folder / "base" / "config.json")
    return world.lora("validate", world.recipe(model={"name": name}))


@case("Adapters", "a configuration that is as large as weights")
def _(world: World) -> Printed:
    folder = world.folder / world.trained()
    with (folder / "adapter_config.json").open("ab") as file:
        file.truncate(2**25)
    return world.lora("predict", "--adapter", "trained", "a film")


@case("Language models", "a chat template without an end")
def _(world: World) -> Printed:
    world.write(
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    )
    loop = "{% for i in range(99999) %}"
    world.write("t.jinja", loop * 3 + "{% endfor %}" * 3)
    task = {"messages_column": "messages", "chat_template": "t.jinja", "text_column": ...}
    recipe = world.recipe("llama", data={"path": "rows.jsonl"}, task=task)
    with mock.patch("lora_cli.tasks.generation.chat_template.TIMEOUT_S", 0.05):
        return world.lora("validate", recipe, "--data")
