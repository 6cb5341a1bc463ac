"""Where an adapter lies: a folder, a folder inside it, or a repository of the Hub.

    out/reviews                 a folder of this machine
    user/name                   a repository of the Hub, if there is no such folder
    user/name@v1.0              at a branch, a tag or a commit
    user/name/second@v1.0       a folder of it, or a file of another tool
    hf://user/name              the same, where a folder of that name stands in the way

What the Hub has comes through huggingface_hub's cache: it is asked whether there is anything newer,
unless `HF_HUB_OFFLINE` is set or it cannot be reached. A folder without an adapter of its own that
holds one in a folder of it, as PEFT saves an adapter with a name, stands for that one. Folders that
are named as the parts of a base are one adapter together: `unet/` and `text_encoder/`.
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
# of other tools: what a training goes on from, and a whole model next to its adapter
LARGE = ["pytorch_model*", "model*.safetensors", "optimizer*", "scheduler*", "rng_state*",
         "training_args*", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ckpt", "*.tar*",
         "*.zip"]  # fmt: skip
SHOWN = 5  # folders in a message


def find_adapter_folder(name: str, at: str) -> Path:
    """Return the folder of an adapter; of one of the Hub, the folder of the cache.

    A name that means no adapter comes back as a path, for whoever opens it to reject.

    Args:
        name: As a user wrote it.
        at: Where it was written.

    Raises:
        LoraError: If the Hub does not give it, or a folder holds several.
    """
    path, found = Path(expanded(name)), NAME.fullmatch(name)
    if found is None or (not found[1] and (path.exists() or _is_local(path))):
        return _own_or_inner(path, at) if path.is_dir() else path
    folder = _from_hub(found[2], found[3].strip("/"), found[4], at)
    return _own_or_inner(folder, at)


def shown_name(folder: Path) -> str:
    """Return how a folder is called: of one in the Hub's cache, the repository and the commit."""
    parts = folder.absolute().parts
    for i, part in enumerate(parts[:-2]):
        if (cached := CACHED.fullmatch(part)) and parts[i + 1] == "snapshots":
            inner = "/".join([cached[1].replace("--", "/"), *parts[i + 3 :]])
            return f"{inner}@{parts[i + 2]}"
    return str(folder)


def _is_local(path: Path) -> bool:
    """Return whether a name whose folder is not there begins with a folder that is."""
    return not path.is_absolute() and Path(path.parts[0]).is_dir()


def _own_or_inner(folder: Path, at: str) -> Path:
    """Return a folder, or the only one inside it that holds an adapter.

    Raises:
        LoraError: If there are several.
    """
    if any((folder / name).exists() for name in OWN_FILES) or adapter_parts(folder):
        return folder
    if (folder / DIFFUSERS_FILE).is_file():
        return folder
    found = [
        file.parent
        for pattern in (f"*/{CONFIG_FILE}", f"*/*/{CONFIG_FILE}")
        for file in sorted(folder.glob(pattern))
        if "checkpoints" not in file.relative_to(folder).parts
    ]
    if len(found) > 1:
        names = [inner.relative_to(folder).as_posix() for inner in found]
        shown = ", ".join(f"`{name}`" for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        named = shown_name(folder)
        before, is_hub, commit = named.partition("@")
        example = f"{before}/{names[0]}@{commit}" if is_hub else f"{named}/{names[0]}"
        what = f"{named} holds {len(names)} adapters: {shown}{more}"
        raise LoraError(what, at, f"name one of them, as `{example}`")
    if found:
        warn(f"the adapter is read from {shown_name(found[0])}: it is the only one in there")
        return found[0]
    return folder


# ------------------------------------------------------------------------------------- the Hub


def _from_hub(repository: str, inner: str, revision: str | None, at: str) -> Path:
    """Return the folder of the cache that holds a repository's adapter, and nothing large besides.

    Raises:
        LoraError: If it cannot be had, with the reason.
    """
    try:
        if inner.endswith(".safetensors"):  # a file of diffusers or kohya
            return _snapshot(repository, revision, [glob.escape(inner)]) / inner
        # which folders there are, and what the manifest of each vouches for
        small = [name for name in (CONFIG_FILE, MANIFEST_FILE) for name in (name, f"*/{name}")]
        top = _snapshot(repository, revision, [*small, DIFFUSERS_FILE])
        folder = _own_or_inner(top / inner, at)
        before = "" if folder == top else f"{folder.relative_to(top).as_posix()}/"
        names = _listed(folder)
        parts = adapter_parts(folder)
        if not names and not parts and not (folder / CONFIG_FILE).exists():
            if (folder / DIFFUSERS_FILE).is_file():
                return folder
            where = f" in `{inner}`" if inner else ""
            what = f"the Hub's `{repository}` holds no adapter{where}"
            raise LoraError(what, at, f"it lists its files: {_page(repository)}/tree/main")
        wanted = [glob.escape(before + name) for name in names] if names else [f"{before}*"]
        ignored = [f"{before}*/*", *(before + name for name in LARGE)]
        if parts and not names:
            wanted, ignored = [f"{before}{part}/adapter_*" for part in parts], []
        _snapshot(repository, revision, wanted, None if names else ignored)
    except LoraError:
        raise
    except Exception as error:  # of the network and of files, and of any kind
        raise _hub_error(repository, revision, at, error) from error
    return folder


def _page(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def _snapshot(
    repository: str, revision: str | None, wanted: list[str], ignored: list[str] | None = None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    top = snapshot_download(
        repository, revision=revision, allow_patterns=wanted, ignore_patterns=ignored
    )
    return Path(top)


def _listed(folder: Path) -> list[str]:
    """Return the files that belong to an adapter of this tool, by its manifest; none without."""
    try:
        values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        listed = [str(name) for name in values["files"]]
    except (OSError, ValueError, KeyError, TypeError):  # `verify_manifest` names what is wrong
        return []
    return [*listed, MANIFEST_FILE, "README.md", "recipe.yaml"]


def _hub_error(repository: str, revision: str | None, at: str, error: Exception) -> LoraError:
    """Return why a repository cannot be read, and what to do."""
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
