"""Locate an adapter: a local folder, a subfolder of it, or a repository of the Hub.

    out/reviews                 a local folder
    user/name                   a repository of the Hub, if there is no such folder
    user/name@v1.0              a branch, a tag or a commit of it
    user/name/second@v1.0       a folder in it, or a file of another tool
    hf://user/name              a repository, even if there is a local folder of that name

Repositories are downloaded through huggingface_hub's cache, which asks the Hub for newer versions,
unless `HF_HUB_OFFLINE` is set or the Hub cannot be reached. If a folder holds no adapter but one of
its subfolders does, as PEFT saves named adapters, the subfolder is used. Subfolders named after the
parts of a base, `unet/` and `text_encoder/`, together are one adapter.
"""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path

from lora_cli.errors import LoraError, warn
from lora_cli.not_an_adapter import DIFFUSERS_FILE, adapter_parts
from lora_cli.paths import expanded

CONFIG_FILE = "adapter_config.json"
OWN_FILES = (CONFIG_FILE, "adapter_model.safetensors", "adapter_model.bin", "manifest.json",
             "recipe.yaml", "config.json")  # fmt: skip
MANIFEST_FILE = "manifest.json"
NAME = re.compile(r"(hf:/+)?([\w][\w.-]*/[\w][\w.-]*)((?:/[\w][\w.-]*)*)(?:@([^@\s]+))?/?")
CACHED = re.compile(r"models--(.+)")
# checkpoints and full models that other tools save next to an adapter
LARGE_FILES = ["pytorch_model*", "model*.safetensors", "optimizer*", "scheduler*", "rng_state*",
         "training_args*", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ckpt", "*.tar*",
         "*.zip"]  # fmt: skip
SHOWN = 5  # folders listed in a message


def find_adapter_folder(name: str, at: str) -> Path:
    """Return the folder of an adapter, which for a repository of the Hub is in the cache.

    A name without an adapter is returned as a path; opening it reports the error.

    Args:
        name: The name that the user gave.
        at: Where the user gave it, for errors.

    Raises:
        LoraError: If the Hub cannot provide it, or a folder holds several adapters.
    """
    path, match = Path(expanded(name)), NAME.fullmatch(name)
    if match is None or (not match[1] and (path.exists() or _is_local(path))):
        return _own_or_inner(path, at) if path.is_dir() else path
    folder = _from_hub(match[2], match[3].strip("/"), match[4], at)
    return _own_or_inner(folder, at)


def shown_name(folder: Path) -> str:
    """Return a folder's name for messages: `repository@commit` if it is in the Hub's cache."""
    parts = folder.absolute().parts
    for i, part in enumerate(parts[:-2]):
        if (cached := CACHED.fullmatch(part)) and parts[i + 1] == "snapshots":
            inner = "/".join([cached[1].replace("--", "/"), *parts[i + 3 :]])
            return f"{inner}@{parts[i + 2]}"
    return str(folder)


def _is_local(path: Path) -> bool:
    """Return whether the first component of a relative path is an existing folder."""
    return not path.is_absolute() and Path(path.parts[0]).is_dir()


def _own_or_inner(folder: Path, at: str) -> Path:
    """Return the folder if it holds an adapter, otherwise its only subfolder that does.

    Raises:
        LoraError: If several subfolders do.
    """
    if any((folder / name).exists() for name in OWN_FILES) or adapter_parts(folder):
        return folder
    if (folder / DIFFUSERS_FILE).is_file():
        return folder
    folders = [
        file.parent
        for pattern in (f"*/{CONFIG_FILE}", f"*/*/{CONFIG_FILE}")
        for file in sorted(folder.glob(pattern))
        if "checkpoints" not in file.relative_to(folder).parts
    ]
    if len(folders) > 1:
        names = [path.relative_to(folder).as_posix() for path in folders]
        shown = ", ".join(f"`{name}`" for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        folder_name = shown_name(folder)
        prefix, is_hub, commit = folder_name.partition("@")
        example = f"{prefix}/{names[0]}@{commit}" if is_hub else f"{folder_name}/{names[0]}"
        what = f"{folder_name} holds {len(names)} adapters: {shown}{more}"
        raise LoraError(what, at, f"name one of them, as `{example}`")
    if folders:
        warn(f"the adapter is read from {shown_name(folders[0])}: it is the only one in there")
        return folders[0]
    return folder


# ------------------------------------------------------------------------------------- the Hub


def _from_hub(repository: str, inner: str, revision: str | None, at: str) -> Path:
    """Download a repository's adapter without other large files, and return its cached folder.

    Raises:
        LoraError: If that fails, with the reason.
    """
    try:
        if inner.endswith(".safetensors"):  # a file of diffusers or kohya
            return _snapshot(repository, revision, [glob.escape(inner)]) / inner
        # first the small files that show the folders, and the manifests that list their files
        small = [name for name in (CONFIG_FILE, MANIFEST_FILE) for name in (name, f"*/{name}")]
        top = _snapshot(repository, revision, [*small, DIFFUSERS_FILE])
        folder = _own_or_inner(top / inner, at)
        prefix = "" if folder == top else f"{folder.relative_to(top).as_posix()}/"
        names = _manifest_files(folder)
        parts = adapter_parts(folder)
        if not names and not parts and not (folder / CONFIG_FILE).exists():
            if (folder / DIFFUSERS_FILE).is_file():
                return folder
            where = f" in `{inner}`" if inner else ""
            what = f"the Hub's `{repository}` holds no adapter{where}"
            raise LoraError(what, at, f"it lists its files: {_page(repository)}/tree/main")
        allowed = [glob.escape(prefix + name) for name in names] if names else [f"{prefix}*"]
        ignored = [f"{prefix}*/*", *(prefix + name for name in LARGE_FILES)]
        if parts and not names:
            allowed, ignored = [f"{prefix}{part}/adapter_*" for part in parts], []
        _snapshot(repository, revision, allowed, None if names else ignored)
    except LoraError:
        raise
    except Exception as error:  # errors of the network, of files, and of many other kinds
        raise _hub_error(repository, revision, at, error) from error
    return folder


def _page(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def _snapshot(
    repository: str, revision: str | None, allowed: list[str], ignored: list[str] | None = None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    top = snapshot_download(
        repository, revision=revision, allow_patterns=allowed, ignore_patterns=ignored
    )
    return Path(top)


def _manifest_files(folder: Path) -> list[str]:
    """Return the files that the manifest lists, for adapters of this tool; otherwise none."""
    try:
        values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        listed = [str(name) for name in values["files"]]
    except (OSError, ValueError, KeyError, TypeError):  # `verify_manifest` reports the error
        return []
    return [*listed, MANIFEST_FILE, "README.md", "recipe.yaml"]


def _hub_error(repository: str, revision: str | None, at: str, error: Exception) -> LoraError:
    """Return an error that says why a repository cannot be read, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    from lora_cli.models.load_errors import place_error

    here = f"there is no folder {repository} here, and "
    if (place := place_error(error)) is not None:
        return place
    if isinstance(error, hub.GatedRepoError):
        what = f"the Hub's `{repository}` is gated: its owner decides who may read it"
        return LoraError(what, at, f"ask at {_page(repository)}, then `hf auth login`")
    if isinstance(error, hub.RevisionNotFoundError):
        what = f"the Hub's `{repository}` has no revision `{revision or 'main'}`"
        return LoraError(what, at, "a revision is a branch, a tag, or the hash of a commit")
    if isinstance(error, hub.RepositoryNotFoundError):
        what = f"{here}the Hub has no `{repository}` that you may read"
        hint = "is the name right? What is private is read after `hf auth login`"
    elif constants.HF_HUB_OFFLINE:
        what = f"{here}the Hub is not asked for `{repository}`: `HF_HUB_OFFLINE` is set"
        hint = f"fetch it once with `hf download {repository}`, or unset HF_HUB_OFFLINE"
    elif isinstance(error, hub.LocalEntryNotFoundError | hub.HfHubHTTPError | OSError):
        cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) else error
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        what = f"{here}the Hub cannot be asked for `{repository}`: {lines[0]}"
        hint = f"try it again, or fetch it where it can be reached: `hf download {repository}`"
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what, hint = f"cannot load the adapter `{repository}`: {lines[0]}", "is the name right"
    return LoraError(what, at, f"{hint}; a local folder is written with a slash: `./{repository}`")
