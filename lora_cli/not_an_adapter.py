"""Whether a folder that was named as an adapter is one; if not, what it is instead."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lora_cli.errors import LoraError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PICKLES = ("adapter_model.bin", "adapter_model.pt")
MODEL_FILES = ("config.json", "model_index.json")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
MANIFEST_FILE = "manifest.json"
# what diffusers calls the parts of its pipelines
PARTS = re.compile(r"(unet|transformer|text_encoder|image_encoder|prior|decoder|vae)(_\d+)?")


def adapter_parts(folder: Path) -> list[str]:
    """Return the names of a base's parts for which a folder holds an adapter, in a folder each.

    Other folders, as of PEFT's adapters with a name, are no parts: the manifest tells them apart,
    or, in a folder of another tool, the names that diffusers gives to parts.

    Returns:
        `[text_encoder, unet]`; none for an adapter of a base that is one model.
    """
    if any((folder / name).exists() for name in (*ADAPTER_FILES, *PICKLES)):
        return []
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        listed = [str(name).split("/") for name in files]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        inner = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_FILES[0]}"))
        return inner if all(PARTS.fullmatch(name) for name in inner) else []
    return [way[0] for way in listed if len(way) == 2 and way[1] == ADAPTER_FILES[0]]


def single_file(folder: Path) -> Path | None:
    """Return the file that is the adapter of a diffusion model, of a folder that is no adapter.

    It is named as diffusers names it, or is the only safetensors file next to no model.
    """
    if any((folder / name).exists() for name in (*ADAPTER_FILES, *PICKLES, MANIFEST_FILE)):
        return None
    if (folder / DIFFUSERS_FILE).is_file():
        return folder / DIFFUSERS_FILE
    files = sorted(folder.glob("*.safetensors"))
    is_model = any((folder / name).exists() for name in MODEL_FILES)
    return files[0] if len(files) == 1 and not is_model else None


def require_adapter(folder: Path) -> None:
    """Reject a folder that holds no file of an adapter, and say what it is instead.

    Args:
        folder: A folder that exists.

    Raises:
        LoraError: If it holds no adapter.
    """
    if any((folder / name).exists() for name in (*ADAPTER_FILES, *PICKLES)):
        return
    if adapter_parts(folder) or single_file(folder) is not None:
        return
    if any((folder / name).is_file() for name in MODEL_FILES):
        raise _model_instead(folder)
    if (folder / "checkpoints").is_dir():
        what = "this folder holds checkpoints of a training, and no adapter yet"
        raise LoraError(what, str(folder), "finish it: `lora train RECIPE --resume`")
    several = sorted(file.name for file in folder.glob("*.safetensors"))
    if several:
        what = f"this folder holds {len(several)} safetensors files, and no {ADAPTER_FILES[0]}"
        raise LoraError(what, str(folder), f"name one of them, as `{folder / several[0]}`")
    raise LoraError(
        f"this folder is not an adapter: it has no {ADAPTER_FILES[1]}",
        str(folder),
        "an adapter is the output folder of `lora train`, or a folder that PEFT saved",
    )


def _model_instead(folder: Path) -> LoraError:
    """Return the error for a folder that holds a whole model."""
    what = "this folder is a model, not an adapter"
    hint = f"to make an adapter for it: `lora init DATA --model {folder}`, then `lora train`"
    if (folder / "merge.json").is_file():
        what = "this folder is a model that an adapter was merged into, not an adapter"
        hint = "name the folder of the adapter; other tools load the merged model as it is"
    elif (folder / "recipe.yaml").is_file():
        what = "this folder is a model that was trained in full, not an adapter"
        hint = "only `lora predict` and `lora eval` take it as an adapter"
    return LoraError(what, str(folder), hint)
