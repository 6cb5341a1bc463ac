"""Save and read adapter folders in PEFT's format.

`adapter_config.json` says how to scale, `adapter_model.safetensors` holds the tensors:

    base_model.model.<module>.lora_A.weight     a layer's parameter, named by its `peft_names`
    base_model.model.<module>.base_layer.bias   a trained bias of an adapted module
    base_model.model.<parameter>                any other trained parameter: of a head, a bias

When a folder is read, its tensors determine the adapted modules and their ranks, and its
configuration gives alpha.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.attach import adapter_layers, name_in_base, trainable_parameters
from lora_cli.adapters.match_names import matches
from lora_cli.adapters.peft_format.diffusion_file import (
    SAVE_AGAIN,
    DiffusionFile,
    read_diffusion_file,
)
from lora_cli.adapters.peft_format.part_folders import join_parts, split_by_part
from lora_cli.adapters.peft_format.peft_config import adapter_type, check_config
from lora_cli.adapters.peft_format.peft_rules import peft_differences
from lora_cli.adapters.peft_format.peft_token_rules import token_differences, written_rows
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES
from lora_cli.adapters.peft_format.saved_buffers import buffers_in_full, without_buffers
from lora_cli.adapters.peft_format.tensor_names import (
    PREFIX,
    adapted_module,
    adapted_modules,
    without_prefix,
)
from lora_cli.adapters.peft_format.trained_config import adapter_config
from lora_cli.adapters.token_rows import token_layers
from lora_cli.errors import BACKUP, IntegrityError, LoraError, counted, name_neighbours, warn
from lora_cli.files import (
    finish_publishing,
    reject_links_outside,
    sha256_of,
    umask_mode,
    verify_manifest,
    write_json,
)
from lora_cli.git_lfs import FETCH, POINTS, is_pointer
from lora_cli.models.bundle import part_names
from lora_cli.models.fingerprint import Fingerprint, read_fingerprint
from lora_cli.not_an_adapter import PICKLES, adapter_parts, require_adapter, single_file
from lora_cli.recipe import AdapterType, Recipe
from lora_cli.tensorfile import read_header

CONFIG_FILE = "adapter_config.json"
ADAPTER_FOLDER = "an adapter is the output folder of `lora train`, or a folder that PEFT saved"
WEIGHTS_FILE = "adapter_model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
COUNTS = ".num_batches_tracked"  # integer buffers of batch normalisation


# ---------------------------------------------------------------------------------------- write


def save_adapter(
    folder: Path,
    model: nn.Module,
    recipe: Recipe,
    in_full: list[str],
    base: Fingerprint | None = None,
) -> None:
    """Write all trained parameters into `folder`, which must exist.

    Args:
        folder: The folder for `adapter_config.json` and `adapter_model.safetensors`.
        model: The model with its adapter attached.
        recipe: The recipe, from which the configuration is made.
        in_full: Names of the modules trained in full.
        base: The fingerprint of the base, which is saved with the adapter.
    """
    if base is not None:
        base.write(folder)
    config = adapter_config(model, recipe, in_full)
    tensors = adapter_tensors(model) | buffers_in_full(model, in_full)
    write_adapter_files(folder, config, tensors, part_names(model))


def write_adapter_files(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], parts: Collection[str] = ()
) -> None:
    """Write an adapter's configuration and tensors, in one folder or in one for each part.

    Args:
        folder: The folder to write to, which must exist.
        config: PEFT's configuration of the whole adapter.
        tensors: The tensors by PEFT's names.
        parts: Names of the base's parts, which are the prefixes of its modules' names.
    """
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    by_part = split_by_part(config, plain, parts) if parts else {"": (config, plain)}
    for part, (part_config, part_tensors) in by_part.items():
        (folder / part).mkdir(exist_ok=True)
        write_json(folder / part / CONFIG_FILE, part_config)
        # copies, since safetensors rejects tensors that share memory, as tied ones do
        copies = {
            PREFIX + name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in part_tensors.items()
        }
        save_file(copies, folder / part / WEIGHTS_FILE, metadata={"format": "pt"})
        umask_mode(folder / part / WEIGHTS_FILE)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by PEFT's names; a shared parameter under each of its names."""
    result: dict[str, Tensor] = {}
    layers = adapter_layers(model)
    rows = _written_rows(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        layer = layers.get(owner)
        if not parameter.requires_grad or id(parameter) in rows:
            continue
        if layer is None:
            result[PREFIX + _plain_name(name, layers)] = parameter.detach()
        else:
            owner = peft_owner(owner, layers)
            result[f"{PREFIX}{owner}.{layer.peft_names[last]}"] = layer.to_peft(last)
    for parameter, names in rows.values():
        result |= {PREFIX + name: parameter.detach() for name in names if parameter.requires_grad}
    return result


def _written_rows(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[str]]]:
    """Return the trained rows of embeddings, each with its names in the file."""
    by_parameter: dict[int, tuple[nn.Parameter, list[str]]] = {}
    if token_layers(model):
        for name, layer in written_rows(model)[1].items():
            names = by_parameter.setdefault(id(layer.rows), (layer.rows, []))[1]
            names.append(f"{name}.{layer.peft_names['rows']}")
    return by_parameter


def differences_in_peft(
    model: nn.Module, recipe: Recipe, in_full: list[str], folder: Path | None = None
) -> list[str]:
    """Return the ways in which PEFT would read a saved adapter differently from this tool.

    Args:
        model: The model with its adapter attached; may be on the meta device.
        recipe: The recipe, from which the configuration is made.
        in_full: Names of the modules trained in full.
        folder: The folder with the saved adapter; None to check what would be saved.
    """
    saved: dict[str, tuple[dict[str, Any], Collection[str]]] = {}
    if folder is None:
        config, tensors = adapter_config(model, recipe, in_full), adapter_tensors(model)
        plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        parts = part_names(model)
        saved |= split_by_part(config, plain, parts) if parts else {"": (config, plain)}
    else:
        for part in adapter_parts(folder) or [""]:
            config = json.loads((folder / part / CONFIG_FILE).read_text(encoding="utf-8"))
            header = read_header(folder / part / WEIGHTS_FILE)
            saved[part] = config, {name.removeprefix(PREFIX) for name in header}
    differences = []
    for part, (config, names) in saved.items():
        adapted = model.get_submodule(part)
        differences += peft_differences(adapted, config, names) + token_differences(adapted, config)
    return differences


# ----------------------------------------------------------------------------------------- read


@dataclass
class AdapterFolder:
    """An adapter folder in memory: its configuration and its tensors, by names without prefix."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    verified: bool
    """Whether a manifest vouched for the files; False for a folder that another tool made."""
    base: Fingerprint | None = None
    """The fingerprint of the base that it was trained on; None if another tool made it."""
    parts: tuple[str, ...] = ()
    """Names of the base's parts that have a folder; empty for a base that is one model."""
    file: DiffusionFile | None = None
    """A file of another tool, whose names `use_names_of` translates once the base is loaded."""

    @property
    def type(self) -> AdapterType:
        """The adapter's type, as recipes name it."""
        return adapter_type(self.config)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the tensor files in an adapter folder: one, or one for each part."""
    if folder.is_file():
        return [""]
    if not (parts := adapter_parts(folder)) and (file := single_file(folder)) is not None:
        return [file.name]
    return [f"{part}/{WEIGHTS_FILE}" for part in parts] or [WEIGHTS_FILE]


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of an adapter's tensor file; with several, `name: hash` of each."""
    hashes = {name: sha256_of(folder / name) for name in weight_files(folder)}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return ", ".join(f"{name}: {sha256}" for name, sha256 in hashes.items())


def read_adapter(path: Path) -> AdapterFolder:
    """Read an adapter folder, or a file of diffusers or kohya, without running code from it.

    Raises:
        LoraError: If it is not an adapter folder, or its kind is not supported.
        IntegrityError: If a file is damaged.
    """
    if path.is_file():
        return _read_single_file(path)
    if not path.is_dir():
        what, hint = f"there is no folder {path}", f"{name_neighbours(path)}; {ADAPTER_FOLDER}"
        raise LoraError(what, "--adapter", hint)
    reject_links_outside(path)
    finish_publishing(path)
    require_adapter(path)
    parts = adapter_parts(path)
    if not parts and (file := single_file(path)) is not None:
        return _read_single_file(file)
    for part in parts or [""]:
        _require_weights(path / part)
    files = [f"{part}/{CONFIG_FILE}" for part in parts] or [CONFIG_FILE]
    verified = verify_manifest(path, *files, *weight_files(path))
    by_part = {part: _read_files(path / part) for part in parts or [""]}
    config, tensors = join_parts(by_part, str(path)) if parts else by_part[""]
    if PEFT_TYPES[config["peft_type"]].supported and _is_idle(tensors):
        warn(f"the adapter {path} changes nothing: one factor of each update is all zeros")
    if not verified and not parts and (unnamed := _unnamed_modules(config, tensors)):
        more = f" and {counted(len(unnamed) - 1, 'more module')}" if unnamed[1:] else ""
        warn(
            f"the file adapts `{unnamed[0]}`{more}, which `target_modules` of {CONFIG_FILE} does "
            "not name: they are adapted here, and PEFT leaves them out"
        )
    return AdapterFolder(path, config, tensors, verified, read_fingerprint(path), tuple(parts))


def _read_single_file(path: Path) -> AdapterFolder:
    """Read a file of another tool.

    Raises:
        LoraError: If the file belongs to an adapter folder, or as `read_diffusion_file`.
    """
    if path.name in (CONFIG_FILE, WEIGHTS_FILE, *PICKLES):
        what = f"`{path.name}` is one file of an adapter"
        raise LoraError(what, str(path), f"name its folder: {path.parent}")
    if not path.name.endswith(".safetensors"):
        what = "this file is no safetensors file"
        raise LoraError(what, str(path), f"{ADAPTER_FOLDER}, or a file of diffusers or kohya")
    file = read_diffusion_file(path)
    return AdapterFolder(path, file.config, file.tensors, verified=False, file=file)


def _require_weights(path: Path) -> None:
    """Reject a folder without a readable tensor file.

    Raises:
        LoraError: If it has none.
    """
    if (path / WEIGHTS_FILE).is_file():
        return
    pickles = [name for name in PICKLES if (path / name).exists()]
    if pickles:
        raise LoraError(
            f"`{pickles[0]}` is a pickle, which can run code when it is read",
            str(path),
            "load it in PEFT where you trust it, and save it again",
        )
    raise LoraError(f"there is no {WEIGHTS_FILE}", str(path), ADAPTER_FOLDER)


def _read_files(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of one folder, checked separately.

    Raises:
        LoraError: If the adapter is of a kind that is not supported.
        IntegrityError: If a file is damaged.
    """
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise LoraError(f"there is no {CONFIG_FILE}", str(path), ADAPTER_FOLDER) from error
    except (ValueError, RecursionError) as error:
        what, hint = f"not valid JSON: {error}", BACKUP
        if is_pointer(path / CONFIG_FILE):
            what, hint = f"this is {POINTS}", FETCH
        raise IntegrityError(what, str(path / CONFIG_FILE), hint) from error
    if not isinstance(config, dict):
        raise IntegrityError("not a JSON object", str(path / CONFIG_FILE), BACKUP)
    check_config(config, str(path / CONFIG_FILE))
    tensors = _tensors_of(path)
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        what = f"`{bad[0]}` contains NaN or infinity"
        raise IntegrityError(what, str(path / WEIGHTS_FILE), BACKUP)
    return config, tensors


def _is_idle(tensors: dict[str, Tensor]) -> bool:
    """Return whether all updates are zero because a factor is zero, as before training."""
    zeros: dict[str, list[bool | None]] = {}
    for name, tensor in tensors.items():
        if (module := adapted_module(name)) is not None:
            # DoRA's magnitude is not a factor
            is_zero = not bool(tensor.any()) if "magnitude" not in name else None
            zeros.setdefault(module, []).append(is_zero)
    if any(".token_adapter." in name for name in tensors):
        return False
    return bool(zeros) and all(None not in flags and any(flags) for flags in zeros.values())


def _unnamed_modules(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Return the modules that the file adapts but the configuration does not name, sorted.

    Return none if it names none of them, because then the tool used other names throughout.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not targets or targets == "all-linear" or config.get("target_parameters"):
        return []
    modules = sorted(adapted_modules(tensors))
    matched = {name for name in modules if matches(targets, name) and not matches(excluded, name)}
    return [name for name in modules if name not in matched] if matched else []


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder, by names without PEFT's prefix.

    Raises:
        IntegrityError: If a file is damaged, or holds what is no weight.
    """
    if not (parts := adapter_parts(path)):
        return _tensors_of(path)
    return {f"{p}.{name}": t for p in parts for name, t in _tensors_of(path / p).items()}


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, by names without PEFT's prefix."""
    file, hint = path / WEIGHTS_FILE, SAVE_AGAIN
    entries = read_header(file)
    for name, entry in entries.items():
        if entry.dtype not in FLOATS and not name.endswith(COUNTS):
            what = f"`{name}` is of dtype {entry.dtype}, which no weight has"
            raise IntegrityError(what, str(file), hint)
    if len({without_prefix(name) for name in entries}) != len(entries):
        what = "a tensor appears twice, with and without PEFT's prefix"
        raise IntegrityError(what, str(file), hint)
    return {without_prefix(name): tensor for name, tensor in load_file(file).items()}


def ranks_of(path: Path) -> dict[str, int]:
    """Return the rank of each adapted module of an adapter folder, by the shapes of its tensors.

    Raises:
        IntegrityError: If a file is damaged.
    """
    end = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(embedding_)?A(\.weight)?")
    ranks = {}
    for part in adapter_parts(path) or [""]:
        for name, entry in read_header(path / part / WEIGHTS_FILE).items():
            if match := end.fullmatch(name):
                ranks[f"{part}.{match[1]}" if part else match[1]] = entry.shape[0]
    return ranks


def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into a model that has the same adapter attached, in place.

    Args:
        model: A model made ready by the same recipe.
        tensors: What `read_tensors` returned.
    """
    layers, parameters = adapter_layers(model), trainable_parameters(model)
    rows, tensors = _written_rows(model), without_buffers(tensors, model)
    names = {name.removeprefix(PREFIX) for name in adapter_tensors(model)}
    assert names == set(tensors), "the tensors belong to another recipe"
    with torch.no_grad():
        for name, parameter in parameters.items():
            owner, _, last = name.rpartition(".")
            layer = layers.get(owner)
            if id(parameter) in rows:
                parameter.copy_(tensors[rows[id(parameter)][1][0]])
            elif layer is None:
                parameter.copy_(tensors[_plain_name(name, layers)])
            else:
                owner = peft_owner(owner, layers)
                layer.from_peft(last, tensors[f"{owner}.{layer.peft_names[last]}"])


def peft_owner(name: str, layers: Collection[str]) -> str:
    """Return PEFT's name of a low-rank layer; inner layers of nested ones get `.base_layer`."""
    module = name_in_base(name, layers)
    return module + ".base_layer" * name.removeprefix(module).count(".base")


def _plain_name(name: str, layers: Collection[str]) -> str:
    """Return PEFT's name of a parameter that is trained in full."""
    owner, _, last = name.rpartition(".")
    return f"{peft_owner(owner, layers)}.{last}" if name_in_base(owner, layers) != owner else name
