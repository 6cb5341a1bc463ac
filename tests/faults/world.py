"""A folder in which commands are run as a user runs them, and what they print is kept.

with World(folder) as world:
    world.rows("rows.csv", "text,label\\na,\\n")
    printed = world.lora("validate", world.recipe())
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tiny

import lora_cli.time_limit  # noqa: F401 - it binds `signal.signal`, which is replaced below
from lora_cli.cli.app import main
from lora_cli.recipe import Recipe, load_recipe

GOOD = "".join(f"{text},{'bad' if i % 2 else 'good'}\n" for i, text in enumerate(
    text.replace(",", "") for text in tiny.CORPUS))  # fmt: skip
TABLE = "text,label\n" + GOOD


@dataclass(frozen=True)
class Printed:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What it said at the end, without the log: from the first line of an error on."""
        found = re.search(r"^(error: |Usage: ).*", self.err, re.DOTALL | re.MULTILINE)
        return found[0] if found else self.err


class World:
    """A working directory with base models beside it."""

    def __init__(self, folder: Path, bases: Path) -> None:
        self.folder, self.bases = folder, bases
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: str | bytes) -> str:
        """Write a file and return its name."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def recipe(self, base: str = "encoder", name: str = "recipe.yaml", **sections: Any) -> str:
        """Write a recipe of a few steps on `rows.csv` and return its name."""
        if not (self.folder / "rows.csv").exists() and "data" not in sections:
            self.write("rows.csv", TABLE)
        task: dict[str, Any] = {"type": "sequence_classification"}
        if base in ("llama", "gpt2"):
            task = {"type": "causal_lm", "text_column": "text", "max_length": 32}
        values: dict[str, Any] = {
            "model": {"name": f"../bases/{base}"},
            "task": task,
            "data": {"path": "rows.csv"},
            "train": {"max_steps": 2, "micro_batch_size": 2},
        }
        for key, section in sections.items():
            merge = isinstance(section, dict) and key not in ("data",)
            values[key] = {**values.get(key, {}), **section} if merge else section
        values = {k: {n: v for n, v in s.items() if v is not ...} if isinstance(s, dict) else s
                  for k, s in values.items()}  # fmt: skip
        return self.write(name, tiny.yaml_of(values))

    def trained(self, name: str = "trained") -> str:
        """Put a copy of a trained adapter into the folder and return its name."""
        shutil.copytree(self.bases / "trained", self.folder / name)
        return name

    def lora(self, *arguments: str) -> Printed:
        """Run a command in this process, in the folder."""
        out, err = io.StringIO(), io.StringIO()
        argv = mock.patch.object(sys, "argv", ["lora", *arguments])
        handlers = mock.patch.object(signal, "signal")
        with self.inside(), argv, handlers, redirect_stdout(out), redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as exited:
                code = int(exited.code or 0)
            except Exception:  # as the interpreter would print it
                traceback.print_exc()
                code = 1
        return Printed(code, self.plain(out.getvalue()), self.plain(err.getvalue()))

    def load(self, name: str, *flags: str) -> Recipe:
        """Load a recipe of the folder."""
        with self.inside():
            return load_recipe(name, flags)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Work in the folder."""
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(before)

    def plain(self, text: str) -> str:
        """Return a text with paths as a user in the folder would write them."""
        text = text.replace(str(self.folder), ".").replace(str(self.bases), "../bases")
        text = text.replace(str(self.folder.parent), "..")
        return re.sub(r"x{40,}…?", "xxx…", text)  # where a name is cut depends on the folder
