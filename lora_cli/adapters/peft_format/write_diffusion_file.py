"""Write the adapter of a diffusion model as a single file, like diffusers or kohya's scripts.

The scaling is multiplied into B (`lora_up`), so that the result is the same in programs that do not
read alpha, or that read one alpha for all modules.
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
from lora_cli.adapters.peft_format.diffusion_names import CLIP_PREFIXES, DENOISERS, TEXT_ENCODERS
from lora_cli.adapters.peft_format.original_layers import (
    Layer,
    joined_update,
    n_outputs,
    original_layers,
)
from lora_cli.adapters.peft_format.part_folders import most_common
from lora_cli.adapters.peft_format.peft_tensors import sort_tensors
from lora_cli.adapters.peft_format.peft_types import alpha_of
from lora_cli.not_an_adapter import DIFFUSERS_FILE, adapter_parts

TYPES = ("lora", "dora")
TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Update:
    """The update of one module, with the scaling multiplied into B.

    Args:
        part: The name of the base's part.
        name: The name of the module in its part.
        a: (rank, in, ...).
        b: (out, rank, ...).
        magnitude: DoRA's magnitude as PEFT stores it; None without DoRA.
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
        """The name with CLIP's `text_model`, which some versions of transformers omit."""
        lacks_it = self.part in TEXT_ENCODERS and self.name.startswith(CLIP_PREFIXES)
        return f"text_model.{self.name}" if lacks_it else self.name


def obstacles(saved: AdapterFolder, types: tuple[str, ...] = TYPES) -> list[str]:
    """Return the reasons why an adapter cannot be written as a single file.

    Args:
        saved: The adapter, with the base's names.
        types: The types of adapters that the file format supports.
    """
    known = (*DENOISERS, *TEXT_ENCODERS)
    if not saved.parts:
        return ["the base is one model, and not the parts of a diffusion model"]
    if unknown := [part for part in saved.parts if part not in known]:
        return [f"it adapts `{unknown[0]}`, and such a file has no name for it"]
    if saved.type not in types:
        return [f"it is of type `{saved.type}`"]
    sorted_tensors = sort_tensors(saved.tensors, saved.type, ())
    problems = [problem.what for problem in sorted_tensors.problems]
    for name in sorted(sorted_tensors.full_parameters)[:1]:
        problems.append(f"it has trained `{name}` in full")
    for key in ("target_parameters", "trainable_token_indices"):
        if saved.config.get(key):
            problems.append(f"it has `{key}`")
    for name in [n for n in saved.tensors if ".lora_embedding_" in n][:1]:
        problems.append(f"it adapts the embedding `{name.partition('.lora_embedding_')[0]}`")
    return problems


def updates_of(saved: AdapterFolder) -> list[Update]:
    """Return the updates of all modules of an adapter without obstacles."""
    updates = []
    for module, tensors in sort_tensors(saved.tensors, saved.type, ()).by_layer.items():
        part, _, name = module.partition(".")
        a, b = tensors["lora_A"], tensors["lora_B"]
        divisor = math.sqrt(len(a)) if saved.config.get("use_rslora") else len(a)
        scaled = (alpha_of(saved.config, module) / divisor * b.double()).float()
        updates.append(Update(part, name, a.float(), scaled, tensors.get("magnitude")))
    return updates


# ---------------------------------------------------------------------------------------- diffusers


def write_diffusers_file(folder: Path) -> str | None:
    """Write diffusers' file next to the PEFT folders of the parts of a diffusion model.

    Args:
        folder: The folder that contains `unet/` etc.; it may hold no adapter.

    Returns:
        A message why the file was not written, or None if it was.
    """
    if not adapter_parts(folder):
        return "there is no adapter of several parts"
    saved = read_adapter(folder)
    if reasons := obstacles(saved):
        return reasons[0]
    save_for_diffusers(saved, folder)
    return None


def save_for_diffusers(saved: AdapterFolder, folder: Path) -> None:
    """Write an adapter without obstacles as diffusers' `save_lora_weights` does."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    updates = updates_of(saved)
    for update in updates:
        of_text = update.part in TEXT_ENCODERS
        # diffusers recognises the format of a text encoder by these names
        ends = ("lora_A", "lora_B")
        ends = ("lora_linear_layer.down", "lora_linear_layer.up") if of_text else ends
        prefix = f"{update.part}.{update.old_name}"
        for end, matrix in zip(ends, (update.a, update.b), strict=True):
            tensors[f"{prefix}.{end}.weight"] = matrix
        if update.magnitude is not None:
            end = ".weight" if of_text else ""  # transformers and PEFT name it differently
            tensors[f"{prefix}.lora_magnitude_vector{end}"] = update.magnitude
    for part in dict.fromkeys(update.part for update in updates):
        ranks = {update.name: update.rank for update in updates if update.part == part}
        rank, pattern = most_common(ranks)
        config = {
            "r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern,
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
        file: The path to write to.
        has_two_encoders: Whether the base has two text encoders, as Stable Diffusion XL does.
        transformer: The denoiser if it is a transformer, whose layers get the names of the original
            checkpoint; None if it is a U-Net.
    """
    first_encoder = "lora_te1" if has_two_encoders else "lora_te"
    starts = {"text_encoder": first_encoder, "text_encoder_2": "lora_te2"}
    updates = _with_out_proj(updates_of(saved))
    if transformer is not None:
        updates = _in_original_layers(updates, transformer)
    # one alpha for all: in a U-Net, diffusers assigns alphas to the wrong modules
    common_alpha = max(update.rank for update in updates)
    tensors: dict[str, Tensor] = {}
    for update in updates:
        prefix = f"{starts.get(update.part, 'lora_unet')}_{update.old_name.replace('.', '_')}"
        # and it ignores the alphas of some layers of a transformer
        alpha = common_alpha if transformer is None else update.rank
        tensors[f"{prefix}.lora_down.weight"] = update.a
        tensors[f"{prefix}.lora_up.weight"] = update.b * (update.rank / alpha)
        tensors[f"{prefix}.alpha"] = tensor(float(alpha))
    ranks = sorted({update.rank for update in updates})
    is_shared = transformer is None or len(ranks) == 1
    _save(
        tensors,
        file,
        {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(common_alpha) if is_shared else "Dynamic",
        },
    )


def layers_of(transformer: nn.Module) -> dict[str, Layer]:
    """Return the layers of a denoising transformer by the names of kohya's scripts."""
    return original_layers([name for name, _ in transformer.named_modules()], with_xlabs=False)


def _in_original_layers(updates: list[Update], transformer: nn.Module) -> list[Update]:
    """Return updates in which those of the transformer are joined into its original layers."""
    result = [u for u in updates if u.part != TRANSFORMER]
    pairs = {u.name: (u.a, u.b) for u in updates if u.part == TRANSFORMER}
    for name, layer in layers_of(transformer).items():
        if pairs.keys() & set(layer.modules):
            n_rows = [n_outputs(transformer.get_submodule(module)) for module in layer.modules]
            result.append(Update(TRANSFORMER, name, *joined_update(layer, pairs, n_rows), None))
    return result


def _with_out_proj(updates: list[Update]) -> list[Update]:
    """Add a zero update of `out_proj` to text encoders whose attention has none.

    diffusers recognises the format of a text encoder's attention by that name.
    """
    result = list(updates)
    for part in dict.fromkeys(u.part for u in updates if u.part in TEXT_ENCODERS):
        attention = [u for u in updates if u.part == part and ".self_attn." in u.name]
        if attention and not any(u.name.endswith(".out_proj") for u in attention):
            template = attention[0]  # all four projections of CLIP have the same size
            name = f"{template.name.rpartition('.')[0]}.out_proj"
            zeros = (template.a.new_zeros(template.a.shape), template.b.new_zeros(template.b.shape))
            result.append(Update(part, name, *zeros, None))
    return result


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write tensors so that equal tensors and metadata give identical bytes.

    The order in which safetensors writes metadata differs from call to call; a resumed run would
    then publish a different file than an uninterrupted run.
    """
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = save(copies, {"format": "pt", **metadata})
    end = 8 + int.from_bytes(content[:8], "little")  # a file begins with the length of its header
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_header = json.dumps(header, separators=(",", ":")).encode()
    sorted_header += b" " * (-len(sorted_header) % 8)  # the format aligns its tensors to 8 bytes
    file.write_bytes(len(sorted_header).to_bytes(8, "little") + sorted_header + content[end:])
