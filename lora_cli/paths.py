"""Paths as users write them, in recipes and on the command line."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from lora_cli.errors import Problem

ADDRESS = re.compile(r"([A-Za-z][\w+.-]+):/+(.*)", re.DOTALL)
PARAMETERS = re.compile(r"(.*\.\w{2,7})(\?[\w.-]+=.*)", re.DOTALL)
HUB = re.compile(r"(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")
PLACES = ("HOME", "PWD", "TMPDIR")  # variables whose value may be shown


def expanded(text: str) -> str:
    """Return a path with `~` as the home directory; `~nobody` stays as it is."""
    return os.path.expanduser(text)  # pathlib's own raises where there is no such user


def path_problem(text: str, at: str, folder: Path | None = None) -> Problem | None:
    """Return why a text is probably not the path that its author meant, or None.

    A folder called `~`, `$HOME` or `file:` would be made without a word. Nothing is wrong with a
    path that is there, whatever it is called.

    Args:
        text: The path as it was written.
        at: Where it stands, for the problem.
        folder: Where a relative path starts; the working directory by default.
    """
    path = expanded(text)
    if os.path.lexists((folder or Path.cwd()) / path) if "\0" not in path else False:
        return None
    if found := ADDRESS.fullmatch(text.strip()):
        scheme, rest = found[1].lower(), found[2]
        if scheme == "file":
            rest = re.sub(r"^localhost(?=/)", "", rest).lstrip("/")
            return Problem(f"`{text}` is an address, not a path", at, f"write `/{rest}`")
        hint = "write a path on this machine; only `checkpoint.mirror` takes an address"
        if hub := HUB.match(rest):
            hint = f"on the Hub it is called `{hub[1]}`"
        return Problem(f"`{text}` is an address, not a path", at, hint)
    if found := PARAMETERS.fullmatch(text):
        what = f"`{text}` ends with the parameters of an address, which a path does not have"
        return Problem(what, at, f"write the path alone: `{found[1]}`")
    if text != text.strip():
        where = "begins" if text != text.lstrip() else "ends"
        return Problem(f"the path `{text}` {where} with a space", at, f"write `{text.strip()}`")
    if not text.isprintable():
        what = f"the path `{text}` contains an invisible character"
        return Problem(what, at, "write it without that character")
    if found := re.search(r"\$(?:\{(\w+)\}|(\w+))", text):
        name = found[1] or found[2]
        value = os.environ.get(name) if name in PLACES else None
        meant = text.replace(found[0], value) if value else f"the value of {name} in its place"
        hint = f"write {shlex.quote(meant)}" if value else f"write {meant}"
        return Problem(f"`{text}` contains a variable, which is not replaced here", at, hint)
    if path.startswith("~"):
        user = path[1:].partition("/")[0]
        hint = f"a folder of that name is written `./{text}`"
        what = f"there is no user `{user}`" if user else "the home directory is not known"
        return Problem(f"`{text}`: {what}", at, hint)
    return None
