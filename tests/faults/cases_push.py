"""Errors of `lora push`, and of adapters in folders inside a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from cases import CASES, Case, case
from world import Printed, World

from lora_cli.files import write_manifest

CARD = "---\nlibrary_name: peft\n{}\n---\n# A card\n"


def _push(
    change: Callable[[Path], object] = lambda _: None, to: str = "user/name",
    base: str | None = "owner/base",
) -> Callable[[World], Printed]:  # fmt: skip
    def run(world: World) -> Printed:
        change(world.folder / world.trained())
        named = () if base is None else ("--base", base)
        return world.lora("push", "--adapter", "trained", "--to", to, *named)

    return run


def _card(head: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "README.md").write_text(CARD.format(head))


def _name_a_place(folder: Path) -> None:
    """Write the base's folder into a file that nobody expects it in."""
    file = folder / "tokenizer_config.json"
    place = json.loads((folder / "base.json").read_text())["name"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "made_from": place}))
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the manifest would list them
    write_manifest(folder)


for _name, _run in {
    "an adapter that is not there": lambda w: w.lora("push", "--adapter", "no", "--to", "user/x"),
    "an adapter of another tool": _push(lambda f: (f / "manifest.json").unlink()),
    "to a name without an owner": _push(to="name"),
    "to a name that the Hub does not take": _push(to="user/a--b"),
    "a base that is a folder": _push(base=None),
    "a base that is a path": _push(base="./encoder"),
    "a card that is no YAML": _push(_card("tags: [lora")),
    "a card that names files": _push(_card("datasets: [./rows.csv]")),
    "a card with tags that are no words": _push(_card("tags: [{a: 1}]")),
    "a file that names a place": _push(_name_a_place),
    "without a network": _push(),
}.items():
    CASES.append(Case("Pushing", _name, _run))


@case("Adapters", "two of them in folders of a folder")
def _(world: World) -> Printed:
    (world.folder / "both").mkdir()
    for name in ("first", "second"):
        shutil.move(world.folder / world.trained(), world.folder / "both" / name)
    return world.lora("predict", "--adapter", "both", "a film")


@case("Adapters", "of the Hub, without a network")
def _(world: World) -> Printed:
    return world.lora("predict", "--adapter", "user/name", "a film")
