"""Write the adapter of a diffusion model as one file, as diffusers or kohya's scripts do.

The scaling is multiplied into B, or into `lora_up`, so that programs that do not read alpha, or
read one alpha for all modules, compute the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn, tensor

from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.adapters.peft_format.diffusion_file import METADATA
from lora_cli.adapters.peft_format.diffusion_names import CLIP, DENOISERS, TEXT_ENCODERS
from lora_cli.adapters.peft_format.original_layers import (
    Layer,
    n_outputs,
    original_layers,
    whole_update,
)
from lora_cli.adapters.peft_format.part_folders import most_common
from lora_cli.adapters.peft_format.peft_tensors import sort_tensors
from lora_cli.adapters.peft_format.peft_types import alpha_of
from lora_cli.not_an_adapter import DIFFUSERS_FILE, adapter_parts

TYPES = ("lora", "dora")
TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one module, with the scaling in B.

    Args:
        part: Of the base.
        name: Of the module, in its part.
        a: (rank, in, ...).
        b: (out, rank, ...).
        magnitude: Of DoRA, as PEFT stores it.
    """

    part: str
    name: str
    a: Tensor
    b: Tensor
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return int(self.a.shape[0])

    @property
    def old_name(self) -> str:
        """The name with CLIP's `text_model`, which versions of transformers have or lack."""
        has_lost_it = self.part in TEXT_ENCODERS and self.name.startswith(CLIP)
        return f"text_model.{self.name}" if has_lost_it else self.name


def obstacles(saved: AdapterFolder, types: tuple[str, ...] = TYPES) -> list[str]:
    """Return what of an adapter has no place in such a file.

    Args:
        saved: The adapter, by the names of the base.
        types: The types of adapters that it has a place for.
    """
    known = (*DENOISERS, *TEXT_ENCODERS)
    if not saved.parts:
        return ["the base is one model, and not the parts of a diffusion model"]
    if other := [part for part in saved.parts if part not in known]:
        return [f"it adapts `{other[0]}`, and such a file has no name for it"]
    if saved.type not in types:
        return [f"it is of type `{saved.type}`"]
    found = sort_tensors(saved.tensors, saved.type, ())
    problems = [problem.what for problem in found.problems]
    for name in sorted(found.plain)[:1]:
        problems.append(f"it has trained `{name}` in full")
    for key in ("target_parameters", "trainable_token_indices"):
        if saved.config.get(key):
            problems.append(f"it has `{key}`")
    for name in [n for n in saved.tensors if ".lora_embedding_" in n][:1]:
        problems.append(f"it adapts the embedding `{name.partition('.lora_embedding_')[0]}`")
    return problems


def updates_of(saved: AdapterFolder) -> list[Update]:
    """Return what an adapter without obstacles adds to each module."""
    found = []
    for module, own in sort_tensors(saved.tensors, saved.type, ()).of_layers.items():
        part, _, name = module.partition(".")
        a, b = own["lora_A"], own["lora_B"]
        divisor = math.sqrt(len(a)) if saved.config.get("use_rslora") else len(a)
        scaled = (alpha_of(saved.config, module) / divisor * b.double()).float()
        found.append(Update(part, name, a.float(), scaled, own.get("magnitude")))
    return found


# ---------------------------------------------------------------------------------------- diffusers


def write_diffusers_file(folder: Path) -> str | None:
    """Write diffusers' file next to the PEFT folders of the parts of a diffusion model.

    Args:
        folder: Where `unet/` and its like are; it may hold no adapter.

    Returns:
        Why there is no such file, for a reader; None if there is.
    """
    if not adapter_parts(folder):
        return "there is no adapter of several parts"
    saved = read_adapter(folder)
    if found := obstacles(saved):
        return found[0]
    save_for_diffusers(saved, folder)
    return None


def save_for_diffusers(saved: AdapterFolder, folder: Path) -> None:
    """Write an adapter without obstacles as diffusers' `save_lora_weights` does."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    updates = updates_of(saved)
    for one in updates:
        of_text = one.part in TEXT_ENCODERS
        # diffusers tells the format of a text encoder by these names
        ends = ("lora_A", "lora_B")
        ends = ("lora_linear_layer.down", "lora_linear_layer.up") if of_text else ends
        before = f"{one.part}.{one.old_name}"
        for end, matrix in zip(ends, (one.a, one.b), strict=True):
            tensors[f"{before}.{end}.weight"] = matrix
        if one.magnitude is not None:
            end = ".weight" if of_text else ""  # which transformers and PEFT call differently
            tensors[f"{before}.lora_magnitude_vector{end}"] = one.magnitude
    for part in dict.fromkeys(one.part for one in updates):
        ranks = {one.name: one.rank for one in updates if one.part == part}
        rank, others = most_common(ranks)
        config = {
            "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none",
            "use_rslora": False, "use_dora": saved.type == "dora", "init_lora_weights": True,
        }  # fmt: skip
        metadata |= {f"{part}.{key}": value for key, value in config.items()}
    _save(tensors, folder / DIFFUSERS_FILE, {METADATA: json.dumps(metadata, sort_keys=True)})


# -------------------------------------------------------------------------------------------- kohya


def save_for_kohya(
    saved: AdapterFolder,
    file: Path,
    has_two_encoders: bool,
    transformer: nn.Module | None = None,
) -> None:
    """Write an adapter without obstacles as kohya's scripts do.

    Args:
        saved: The adapter.
        file: What is written.
        has_two_encoders: Whether the base has two text encoders, as Stable Diffusion XL has.
        transformer: What draws, if it is one: its layers have the names of the first checkpoint.
    """
    first = "lora_te1" if has_two_encoders else "lora_te"
    starts = {"text_encoder": first, "text_encoder_2": "lora_te2"}
    updates = _read_by_diffusers(updates_of(saved))
    if transformer is not None:
        updates = _in_original_layers(updates, transformer)
    # one alpha for all: of a U-Net diffusers mistakes which module an alpha belongs to
    shared = max(one.rank for one in updates)
    tensors: dict[str, Tensor] = {}
    for one in updates:
        before = f"{starts.get(one.part, 'lora_unet')}_{one.old_name.replace('.', '_')}"
        # and of some layers of a transformer it reads no alpha
        alpha = shared if transformer is None else one.rank
        tensors[f"{before}.lora_down.weight"] = one.a
        tensors[f"{before}.lora_up.weight"] = one.b * (one.rank / alpha)
        tensors[f"{before}.alpha"] = tensor(float(alpha))
    ranks = sorted({one.rank for one in updates})
    is_shared = transformer is None or len(ranks) == 1
    _save(
        tensors,
        file,
        {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(shared) if is_shared else "Dynamic",
        },
    )


def layers_of(transformer: nn.Module) -> dict[str, Layer]:
    """Return the layers of a transformer that draws, as kohya's scripts call them."""
    return original_layers([name for name, _ in transformer.named_modules()], with_xlabs=False)


def _in_original_layers(updates: list[Update], transformer: nn.Module) -> list[Update]:
    """Return updates of which those of the transformer are by the layers of its authors."""
    result = [one for one in updates if one.part != TRANSFORMER]
    own = {one.name: (one.a, one.b) for one in updates if one.part == TRANSFORMER}
    for name, layer in layers_of(transformer).items():
        if own.keys() & set(layer.modules):
            n_rows = [n_outputs(transformer.get_submodule(module)) for module in layer.modules]
            result.append(Update(TRANSFORMER, name, *whole_update(layer, own, n_rows), None))
    return result


def _read_by_diffusers(updates: list[Update]) -> list[Update]:
    """Return updates, and zeros for `out_proj` where a text encoder's attention lacks it.

    By that name diffusers tells the format of a text encoder's attention.
    """
    result = list(updates)
    for part in dict.fromkeys(one.part for one in updates if one.part in TEXT_ENCODERS):
        attention = [u for u in updates if u.part == part and ".self_attn." in u.name]
        if attention and not any(one.name.endswith(".out_proj") for one in attention):
            like = attention[0]  # CLIP's four are of one size
            name = f"{like.name.rpartition('.')[0]}.out_proj"
            zeros = (like.a.new_zeros(like.a.shape), like.b.new_zeros(like.b.shape))
            result.append(Update(part, name, *zeros, None))
    return result


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write tensors so that equal tensors and metadata give equal bytes.

    safetensors writes the entries of the metadata in an order that differs from call to call; a
    resumed run would then publish another file than a run that was not stopped.
    """
    copies = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
    content = save(copies, {"format": "pt", **metadata})
    end = 8 + int.from_bytes(content[:8], "little")  # a file begins with the length of its header
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_header = json.dumps(header, separators=(",", ":")).encode()
    sorted_header += b" " * (-len(sorted_header) % 8)  # the format aligns its tensors to 8 bytes
    file.write_bytes(len(sorted_header).to_bytes(8, "little") + sorted_header + content[end:])
