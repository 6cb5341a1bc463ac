"""The adapter folder in PEFT's format, both ways.

`adapter_config.json` says how to scale, `adapter_model.safetensors` holds the matrices:

    base_model.model.<module>.lora_A.weight     what a layer added; the layer has a table of names
    base_model.model.<module>.base_layer.bias   a trained bias of an adapted module
    base_model.model.<parameter>                whatever else is trained: a head, a bias

When a folder is read, its tensors say which modules are adapted and with which rank, and its
configuration says alpha; everything is checked before the model is touched.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import (
    adapter_layers,
    lora_layers,
    name_in_base,
    trainable_parameters,
)
from lora_cli.adapters.lora import LoRALayer
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.parameter_targets import places_of
from lora_cli.adapters.peft_format.peft_config import adapter_type, check_config
from lora_cli.adapters.peft_format.peft_rules import (
    base_modules,
    full_names,
    peft_differences,
    peft_reading,
)
from lora_cli.adapters.peft_format.peft_token_rules import token_differences, written_rows
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES, TYPES_HERE
from lora_cli.adapters.peft_format.tensor_names import PREFIX, adapted_module, without_prefix
from lora_cli.adapters.token_rows import token_layers
from lora_cli.errors import BACKUP, IntegrityError, LoraError, name_neighbours, warn
from lora_cli.files import (
    finish_publishing,
    reject_links_outside,
    umask_mode,
    verify_manifest,
    write_json,
)
from lora_cli.models.fingerprint import Fingerprint, read_fingerprint
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.not_an_adapter import require_adapter
from lora_cli.recipe import AdapterSpec, AdapterType, Recipe
from lora_cli.tensorfile import read_header

CONFIG_FILE = "adapter_config.json"
ADAPTER_FOLDER = "an adapter is the output folder of `lora train`, or a folder that PEFT saved"
WEIGHTS_FILE = "adapter_model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


# ---------------------------------------------------------------------------------------- write


def save_adapter(
    folder: Path,
    model: nn.Module,
    recipe: Recipe,
    in_full: list[str],
    base: Fingerprint | None = None,
) -> None:
    """Write everything that is trained into `folder`, which must exist.

    Args:
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go.
        model: The model with its adapter attached.
        recipe: What the configuration is made from.
        in_full: Names of the modules trained in full.
        base: The fingerprint of the base, which is kept beside the adapter.
    """
    write_json(folder / CONFIG_FILE, adapter_config(model, recipe, in_full))
    if base is not None:
        base.write(folder)
    # copies, since safetensors rejects tensors that share memory, as those of a tie do
    tensors = {
        name: t.cpu().clone(memory_format=torch.contiguous_format)
        for name, t in adapter_tensors(model).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    umask_mode(folder / WEIGHTS_FILE)


def adapter_config(model: nn.Module, recipe: Recipe, in_full: list[str]) -> dict[str, Any]:
    """Return PEFT's configuration; keys that are newer and stand at their default are left out."""
    spec, layers = recipe.adapter, lora_layers(model)
    in_full = full_names(base_modules(model), in_full)
    base = {
        "base_model_name_or_path": recipe.model.name,
        "revision": recipe.model.revision,
        "task_type": recipe.task.peft_task_type,
        "modules_to_save": in_full or None,
        "inference_mode": True,
    }
    if not layers:
        # PEFT has no such types and says so; it would read an empty LoRA as the plain base
        return {"peft_type": _peft_type(spec.type), **base}
    modules = {n: layer for n, layer in layers.items() if not isinstance(layer, LoRAParameter)}
    config = {
        "peft_type": "LORA",
        **base,
        **_ranks_and_alphas(spec, layers),
        "lora_dropout": spec.dropout,
        "target_modules": sorted(modules),
        "bias": spec.bias,
        "fan_in_fan_out": any(_stored_transposed(layer.base) for layer in modules.values()),
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
        **next(iter(layers.values())).peft_config,
    }
    if _peft_type(spec.type) != "LORA":
        kind = PEFT_TYPES[_peft_type(spec.type)]
        patterns = {key: config[key] for key in ("rank_pattern", "alpha_pattern")}
        own = {"r": spec.rank, kind.alpha: _whole(spec.alpha), **dict(kind.defaults), **patterns}
        adapted = {"target_modules": sorted(layers)}
        config = {"peft_type": _peft_type(spec.type), **base, **own, **adapted}
    if len(modules) < len(layers):
        config["target_parameters"] = _target_parameters(model, recipe)
    if token_layers(model):
        config["trainable_token_indices"] = written_rows(model)[0]
    if isinstance(spec.target_modules, list):  # the user's suffixes, if they select no others
        short = {**config, "target_modules": spec.target_modules}
        reading = peft_reading(model, short)
        if reading.adapted == set(modules) and not reading.errors:
            return short
    return config


def _peft_type(kind: AdapterType) -> str:
    """Return PEFT's name of a type; of those that PEFT lacks, this tool's own."""
    return next((name for name, here in TYPES_HERE.items() if here == kind), "LORA")


def _ranks_and_alphas(spec: AdapterSpec, layers: dict[str, LoRALayer]) -> dict[str, Any]:
    """Return PEFT's keys of rank and alpha: the recipe's, unless `adapter.init` changes them.

    Then the modules whose rank or alpha is not that of most are named in full.
    """
    ranks = {name: layer.saved_rank for name, layer in layers.items()}
    alphas = {name: _whole(layer.saved_alpha) for name, layer in layers.items()}
    if spec.init == "default":
        rank, alpha = spec.rank, _whole(spec.alpha)
        rank_pattern = spec.rank_pattern
        alpha_pattern = {key: _whole(value) for key, value in spec.alpha_pattern.items()}
    else:
        rank, alpha = _most_common(ranks), _most_common(alphas)
        longest_first = sorted(layers, key=len, reverse=True)  # the first that fits counts
        rank_pattern = {name: ranks[name] for name in longest_first if ranks[name] != rank}
        alpha_pattern = {name: alphas[name] for name in longest_first if alphas[name] != alpha}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _target_parameters(model: nn.Module, recipe: Recipe) -> list[str]:
    """Return the user's suffixes of adapted parameters, or full names if those select others."""
    names = {
        f"{name_in_base(name, layers)}.{layer.parameter}"
        for layers in [lora_layers(model)]
        for name, layer in layers.items()
        if isinstance(layer, LoRAParameter)
    }
    short = recipe.adapter.target_parameters
    selected = {f"{module}.{key}" for module, key in places_of(model, short)}
    return short if selected == names else sorted(names)


def _stored_transposed(base: nn.Module) -> bool:
    """Return whether the checkpoint has a layer's weight as (in, out)."""
    return isinstance(base, Conv1D) or (isinstance(base, QuantizedLinear) and base.transposed)


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained, under PEFT's names; a shared parameter under each of its names."""
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
    """Return the trained rows of tokens, each with its names in the file."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    if token_layers(model):
        for name, layer in written_rows(model)[1].items():
            names = found.setdefault(id(layer.rows), (layer.rows, []))[1]
            names.append(f"{name}.{layer.peft_names['rows']}")
    return found


def differences_in_peft(
    model: nn.Module, recipe: Recipe, in_full: list[str], folder: Path | None = None
) -> list[str]:
    """Return how PEFT would read what is saved of a model otherwise than this tool does.

    Args:
        model: The model with its adapter attached; may be on the meta device.
        recipe: What the configuration is made from.
        in_full: Names of the modules trained in full.
        folder: Holds what was saved; None asks of what would be.
    """
    if folder is None:
        config, tensors = adapter_config(model, recipe, in_full), set(adapter_tensors(model))
    else:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = set(read_header(folder / WEIGHTS_FILE))
    found = peft_differences(model, config, {name.removeprefix(PREFIX) for name in tensors})
    return found + token_differences(model, config)


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
    """Of the base that it was trained on; None where another tool made it."""

    @property
    def type(self) -> AdapterType:
        """The recipe's type of such an adapter."""
        return adapter_type(self.config)


def read_adapter(path: Path) -> AdapterFolder:
    """Read an adapter folder; nothing in it is run.

    Raises:
        LoraError: If it is not an adapter folder, or of a kind that is not supported.
        IntegrityError: If a file is damaged.
    """
    if not path.is_dir():
        what, hint = f"there is no folder {path}", f"{name_neighbours(path)}; {ADAPTER_FOLDER}"
        raise LoraError(what, "--adapter", hint)
    reject_links_outside(path)
    finish_publishing(path)
    require_adapter(path)
    if not (path / WEIGHTS_FILE).is_file():
        pickles = [
            name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).exists()
        ]
        if pickles:
            raise LoraError(
                f"`{pickles[0]}` is a pickle, which can run code when it is read",
                str(path),
                "load it in PEFT where you trust it, and save it again",
            )
        raise LoraError(f"there is no {WEIGHTS_FILE}", str(path), ADAPTER_FOLDER)
    verified = verify_manifest(path, CONFIG_FILE, WEIGHTS_FILE)
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise LoraError(f"there is no {CONFIG_FILE}", str(path), ADAPTER_FOLDER) from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not valid JSON: {error}", str(path / CONFIG_FILE), BACKUP) from error
    if not isinstance(config, dict):
        raise IntegrityError("not a JSON object", str(path / CONFIG_FILE), BACKUP)
    check_config(config, str(path / CONFIG_FILE))
    tensors = read_tensors(path)
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        what = f"`{bad[0]}` contains NaN or infinity"
        raise IntegrityError(what, str(path / WEIGHTS_FILE), BACKUP)
    if PEFT_TYPES[config["peft_type"]].supported and _is_idle(tensors):
        warn(f"the adapter {path} changes nothing: one factor of each update is all zeros")
    return AdapterFolder(path, config, tensors, verified, read_fingerprint(path))


def _is_idle(tensors: dict[str, Tensor]) -> bool:
    """Return whether all updates are products with a factor of zero, as before training."""
    zeros: dict[str, list[bool | None]] = {}
    for name, tensor in tensors.items():
        if (module := adapted_module(name)) is not None:
            # a length of DoRA is no factor
            is_zero = not bool(tensor.any()) if "magnitude" not in name else None
            zeros.setdefault(module, []).append(is_zero)
    if any(".token_adapter." in name for name in tensors):
        return False
    return bool(zeros) and all(None not in of and any(of) for of in zeros.values())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder, by names without PEFT's prefix.

    Raises:
        IntegrityError: If the file is damaged, or holds what is no weight.
    """
    file, hint = path / WEIGHTS_FILE, "save it again in the tool that made it"
    entries = read_header(file)
    for name, entry in entries.items():
        if entry.dtype not in FLOATS:
            what = f"`{name}` is of dtype {entry.dtype}, which no weight has"
            raise IntegrityError(what, str(file), hint)
    if len({without_prefix(name) for name in entries}) != len(entries):
        what = "a tensor appears twice, with and without PEFT's prefix"
        raise IntegrityError(what, str(file), hint)
    return {without_prefix(name): tensor for name, tensor in load_file(file).items()}


def ranks_of(path: Path) -> dict[str, int]:
    """Return the rank of each adapted module of an adapter folder, by the shapes of its tensors.

    Raises:
        IntegrityError: If the file is damaged.
    """
    end = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(embedding_)?A(\.weight)?")
    entries = read_header(path / WEIGHTS_FILE).items()
    return {match[1]: entry.shape[0] for name, entry in entries if (match := end.fullmatch(name))}


def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into a model that has the same adapter attached, in place.

    Args:
        model: A model made ready by the same recipe.
        tensors: What `read_tensors` returned.
    """
    layers, parameters = adapter_layers(model), trainable_parameters(model)
    rows = _written_rows(model)
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
    """Return PEFT's name of a low-rank layer: of nested ones, the inner are its `base_layer`."""
    module = name_in_base(name, layers)
    return module + ".base_layer" * name.removeprefix(module).count(".base")


def _plain_name(name: str, layers: Collection[str]) -> str:
    """Return PEFT's name of a parameter that is trained as it is."""
    owner, _, last = name.rpartition(".")
    return f"{peft_owner(owner, layers)}.{last}" if name_in_base(owner, layers) != owner else name
