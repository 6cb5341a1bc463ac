"""Upload an adapter to the Hub: the files of its manifest, its card and its recipe.

Predictions, samples and reports are not uploaded, because they contain rows of the data. In the
card and the recipe, local paths are shortened to their last component, the base gets its name on
the Hub, and secrets are masked. The files to upload are collected in a temporary folder with a
manifest of its own, and nothing is sent unless all checks pass.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from lora_cli.adapters.peft_format.adapter_folder import CONFIG_FILE, read_adapter
from lora_cli.errors import LoraError, Problem
from lora_cli.files import (
    MANIFEST,
    finish_publishing,
    reject_links_outside,
    verify_manifest,
    write_json,
    write_manifest,
)
from lora_cli.models.fingerprint import BASE_FILE
from lora_cli.not_an_adapter import adapter_parts
from lora_cli.recipe import RECIPE_FILE, Recipe, load_adapter_recipe
from lora_cli.redaction import redacted
from lora_cli.reporting.report import is_hub_id

CARD_FILE = "README.md"
PLOT_FILE = "learning_curve.png"  # the card shows it
TEXTS = (".json", ".md", ".yaml", ".txt", ".jinja")
# an absolute path with at least two components, which is not part of a URL
PATH = re.compile(r"(?<![\w/:.~@-])~?(?:/[\w.@+%-]+){2,}/?")


@dataclass
class Pushed:
    """The uploaded files, and their address."""

    address: str
    files: list[str]
    notes: list[str] = field(default_factory=list)


def push_adapter(
    adapter: Path, to: str, private: bool = False, revision: str | None = None,
    base: str | None = None,
) -> Pushed:  # fmt: skip
    """Upload an adapter.

    Args:
        adapter: The output folder of `lora train`, `lora combine` or `lora export`.
        to: The repository's id; it is created if it does not exist.
        private: Whether a new repository is private.
        revision: The branch; it is created if it does not exist.
        base: The base model's id on the Hub; None for the base that the adapter names.

    Raises:
        LoraError: If a file must not or cannot be uploaded, or the Hub rejects the upload; then
            nothing was uploaded.
        IntegrityError: If the adapter is damaged.
    """
    _require_id(to, "--to")
    if base is not None:
        _require_id(base, "--base")
    with tempfile.TemporaryDirectory(prefix="lora-push-") as temporary:
        folder = Path(temporary)
        notes = collect_files(adapter, folder, base)
        address = _upload(folder, to, private, revision)
        files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return Pushed(address, files, notes)


def collect_files(adapter: Path, folder: Path, base: str | None) -> list[str]:
    """Collect the files to upload in an empty folder, and return notes for the user.

    Raises:
        LoraError: As `push_adapter`.
    """
    at = str(adapter)
    if not adapter.exists():
        raise LoraError(f"there is no folder {adapter}", "--adapter", "is the path right?")
    if adapter.is_dir():
        reject_links_outside(adapter)
        finish_publishing(adapter)
    if not verify_manifest(adapter) or not (adapter / RECIPE_FILE).is_file():
        what = f"{adapter} holds no {MANIFEST} and {RECIPE_FILE}: another tool made it"
        raise LoraError(what, "--adapter", f"upload it as it is: `hf upload USER/NAME {adapter}`")
    recipe = load_adapter_recipe(adapter)
    if recipe.adapter.type != "full":
        read_adapter(adapter)
    notes = _require_base(recipe, base)
    listed = json.loads((adapter / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in [*listed, *(n for n in (RECIPE_FILE, PLOT_FILE) if (adapter / n).is_file())]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(adapter / name, folder / name)
    for key in recipe.task.local_files:
        file = Path(str(getattr(recipe.task, key)))
        shutil.copyfile(file, folder / file.name)
    _name_base(folder, recipe, base)
    _shorten_recipe(folder / RECIPE_FILE, base)
    _write_card(adapter, folder, recipe, base)
    _require_nothing_private(folder, recipe, adapter, at)
    write_manifest(folder)
    return notes


def _require_id(name: str, at: str) -> None:
    """Reject a name that is not a repository's id, `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    hint = "write `user/name`, as in the address of its page"
    if not is_hub_id(name) or "/" not in name:
        raise LoraError(f"`{name}` is no id of a repository of the Hub", at, hint)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        what = f"`{name}` is no id of a repository of the Hub: {str(error).splitlines()[0]}"
        raise LoraError(what, at, hint) from error


def _require_base(recipe: Recipe, base: str | None) -> list[str]:
    """Reject a base that others cannot get; return a note about one that few can."""
    name = recipe.model.name
    if base is not None or recipe.adapter.type == "full" or is_hub_id(name):
        return []
    if name.startswith("package:"):
        return [f"the base is `{name}`: it is found where that Python package is installed"]
    what = f"the base is a folder of this machine, `{name}`, which nobody else has"
    raise LoraError(what, "--base", "name the base as the Hub does: `--base USER/NAME`")


# ------------------------------------------------------------------------------- private details


def shortened_paths(text: str) -> str:
    """Replace each absolute path in a text by its last component."""
    return PATH.sub(lambda match: PurePath(match[0]).name, text)


def _name_base(folder: Path, recipe: Recipe, base: str | None) -> None:
    """Write the base's name on the Hub into PEFT's configuration and the fingerprint's file."""
    configs = [f"{part}/{CONFIG_FILE}" for part in adapter_parts(folder)] or [CONFIG_FILE]
    keys = [(name, "base_model_name_or_path") for name in configs]
    for name, key in (*keys, (BASE_FILE, "name")):
        file = folder / name
        if base is not None and file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.get(key) == recipe.model.name:
                write_json(file, values | {key: base, "revision": "main"})


def _shorten_recipe(file: Path, base: str | None) -> None:
    """Shorten the paths in a recipe to their last components, and remove its mirror."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if base is not None:
        values["model"] |= {"name": base, "revision": "main"}
    values.get("checkpoint", {}).pop("mirror", None)
    text = yaml.safe_dump(_shortened(values), sort_keys=False, allow_unicode=True, width=1000)
    file.write_text(redacted(text), encoding="utf-8")


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    is_path = isinstance(value, str) and (PurePath(value).is_absolute() or value.startswith("~/"))
    return PurePath(value).name if is_path else value


def _write_card(adapter: Path, folder: Path, recipe: Recipe, base: str | None) -> None:
    """Write the card, after parsing its front matter with the Hub's own library.

    Raises:
        LoraError: If the front matter is invalid.
    """
    from huggingface_hub import ModelCard

    file = adapter / CARD_FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else f"---\n---\n# {adapter.name}\n"
    if base is not None:
        text = text.replace(recipe.model.name, base)
    text = redacted(shortened_paths(text))
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # errors of YAML, and of the library's own checks
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what, hint = f"the head of the card cannot be read: {reason}", "mend it, or delete the file"
        raise LoraError(what, str(file), hint) from error
    if base is not None:
        card.data["base_model"] = base
    head: dict[str, Any] = yaml.safe_load(card.data.to_yaml()) or {}
    if problems := _card_problems(head, str(file)):
        raise LoraError(problems)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")


def _card_problems(data: dict[str, Any], at: str) -> list[Problem]:
    """Return the entries of a card's front matter that the Hub would reject."""
    problems = []
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            if not (isinstance(value, str) and is_hub_id(value)):
                what = f"`{key}` in the head of the card is `{value}`, which is no id of the Hub"
                problems.append(Problem(what, at, "write `user/name`, or leave the key out"))
    for key in ("tags", "language", "metrics"):
        values = data.get(key) or []
        words = [values] if isinstance(values, str) else values
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            what = f"`{key}` in the head of the card is no list of words"
            problems.append(
                Problem(what, at, "write words, in quotation marks where YAML needs it")
            )
    return problems


def _require_nothing_private(folder: Path, recipe: Recipe, adapter: Path, at: str) -> None:
    """Reject files that still contain local paths: the home directory, or paths of the recipe."""
    paths = {str(Path.home()), str(adapter.absolute().parent), recipe.model.name}
    for source in recipe.data.sources:
        values = (getattr(source, key) for key in ("path", "train", "validation", "test"))
        paths |= {str(value or "") for value in values}
    paths = {path for path in paths if path.startswith("/") and path.count("/") > 1}
    problems = []
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXTS and file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            found_path = next((path for path in sorted(paths) if path in text), None)
            if found_path is not None:
                what = f"`{file.name}` names a place of this machine: {found_path}"
                problems.append(Problem(what, at, "take it out of the file, and train again"))
    if problems:
        raise LoraError(problems)


# ------------------------------------------------------------------------------------- the Hub


def _upload(folder: Path, to: str, private: bool, revision: str | None) -> str:
    """Upload a folder, and return the address of the commit.

    Raises:
        LoraError: If the Hub rejects it, with the reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(to, private=private, exist_ok=True)
        if private and not api.repo_info(to).private:
            what = f"`{to}` is there already, and anybody may read it"
            hint = "make it private in its settings, or leave `--private` out"
            raise LoraError(what, "--private", hint)
        if revision is not None:
            api.create_branch(to, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=to, folder_path=folder, revision=revision, commit_message="Upload an adapter"
        )
    except LoraError:
        raise
    except Exception as error:  # errors of the network and of many other kinds
        raise _push_error(to, error) from error
    return str(commit.commit_url)


def _push_error(to: str, error: Exception) -> LoraError:
    """Return an error that says why the Hub rejected an adapter, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    code = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    hint = "try it again: what is there already is not sent twice"
    if constants.HF_HUB_OFFLINE:
        what, hint = "the Hub is not asked: `HF_HUB_OFFLINE` is set", "unset it to push"
    elif code == 401 or isinstance(error, hub.LocalTokenNotFoundError):
        what = "the Hub does not know who you are"
        hint = "`hf auth login`, with a token that may write"
    elif code == 403:
        what, hint = (
            f"the Hub does not let you write `{to}`",
            "is the owner right, and may the token write?",
        )
    elif isinstance(error, ValueError) and "metadata" in str(error).lower():
        what, hint = f"the Hub rejects the card: {' '.join(lines)}", f"mend the head of {CARD_FILE}"
    else:
        what = f"the Hub did not take it: {lines[0]}"
    return LoraError(what, "--to", hint)
