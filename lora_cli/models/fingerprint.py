"""Identify the base of an adapter by a fingerprint of the checkpoint's tensors.

An adapter can be loaded onto any base with the same shapes, and on a wrong one its outputs are
nonsense. So the hash of every pretrained tensor is saved next to the adapter, in `base.json`:

    {"name": "roberta-large", "revision": "main", "fingerprint": "…", "earlier": [],
     "tensors": {"encoder.layer.0.attention.self.query.weight": "…", …}}

A tensor's hash (xxh3, 128 bits) covers its dtype, shape and bytes in the checkpoint. It depends
neither on how the weights are split into files, nor on the dtype in which they are loaded. Names
are relative to the pretrained model: `BertModel` saves `encoder.…`, and `BertForMaskedLM`
`bert.encoder.…`. A checkpoint may contain one or both of two tied tensors; both get the hash of the
stored one. Heads that the task creates are excluded, as they are part of the adapter.

The hashes detect mistakes, not forgery: anyone who can forge a base can also replace `base.json`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from lora_cli.errors import IntegrityError, warn
from lora_cli.files import write_json
from lora_cli.models.bundle import Bundle
from lora_cli.models.find_base import checkpoint_files
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import TensorEntry, read_header

BASE_FILE = "base.json"
CHUNK = 2**24  # bytes that a thread reads at a time
OVERRIDE = "model.allow_other_base"


@dataclass(frozen=True)
class Fingerprint:
    """The pretrained tensors of a base.

    Args:
        name: The base as the recipe names it.
        revision: Its revision on the Hub.
        tensors: The hash of each pretrained tensor, by its name inside the pretrained model.
        earlier: Other bases (name and fingerprint) that the adapter was trained on before, which
            `model.allow_other_base` allowed.
    """

    name: str
    revision: str
    tensors: dict[str, str]
    earlier: tuple[dict[str, str], ...] = ()

    @property
    def total(self) -> str:
        """One hash over all tensors."""
        lines = "".join(f"{name} {self.tensors[name]}\n" for name in sorted(self.tensors))
        return hashlib.sha256(lines.encode()).hexdigest()[:32]

    def differing(self, other: Fingerprint, in_adapter: Collection[str] = ()) -> list[str]:
        """Return the names of tensors that are different, missing or additional in another base.

        Args:
            other: The fingerprint of the other base.
            in_adapter: Names of tensors that the adapter contains in full. They may be added to
                the other base: they were new when the adapter was trained, such as the pooler,
                which masked language models lack.
        """
        own, others = self.tensors, other.tensors
        additional = [
            name
            for name in others.keys() - own.keys()
            if not any(h == name or h.endswith(f".{name}") for h in in_adapter)
        ]
        return [*(name for name, h in own.items() if others.get(name) != h), *sorted(additional)]

    @property
    def facts(self) -> dict[str, Any]:
        """The facts on the base for a report."""
        facts_of_base = {"name": self.name, "revision": self.revision, "fingerprint": self.total}
        return {**facts_of_base, "earlier": list(self.earlier)}

    def write(self, folder: Path) -> None:
        """Write `base.json` into a folder."""
        write_json(folder / BASE_FILE, {**self.facts, "tensors": self.tensors})


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """Return the fingerprint of the base that a folder's adapter was trained on, if it has one.

    Raises:
        IntegrityError: If `base.json` is damaged.
    """
    file = folder / BASE_FILE
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        tensors = {str(name): str(h) for name, h in value["tensors"].items()}
        earlier = tuple(
            {key: str(base[key]) for key in ("name", "fingerprint")} for base in value["earlier"]
        )
        fingerprint = Fingerprint(str(value["name"]), str(value["revision"]), tensors, earlier)
        if fingerprint.total != value["fingerprint"] or not tensors:
            raise ValueError("its hashes do not add up")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = "restore it from a backup or train again"
        raise IntegrityError("the base's fingerprint cannot be read", str(file), hint) from error
    return fingerprint


def fingerprint_of(recipe: Recipe, model: nn.Module, new: Collection[str]) -> Fingerprint | None:
    """Return the fingerprint of the recipe's base; None if it can have none.

    Args:
        recipe: The `model` section names the checkpoint.
        model: The model that was loaded from it, before adapters are attached. Its names define
            which tensors count.
        new: Names of the modules that the task created.

    Raises:
        IntegrityError: If a file of the checkpoint is damaged.
    """
    if recipe.adapter.type == "full":
        return None
    tensors: dict[str, str] = {}
    parts = model.parts if isinstance(model, Bundle) else {"": model}
    for part, module in parts.items():
        files = checkpoint_files(recipe, part)
        if not files:
            where = f"`{recipe.model.name}`" + (f", in its folder `{part}`," if part else "")
            warn(f"{where} has no safetensors files of its own, so no fingerprint is kept")
            return None
        prefix = f"{part}." if part else ""
        new_in_part = [name.removeprefix(prefix) for name in new if name.startswith(prefix)]
        hashes = _pretrained_hashes(files, module, new_in_part)
        tensors |= {f"{prefix}{name}": h for name, h in hashes.items()}
    return Fingerprint(recipe.model.name, recipe.model.revision, dict(sorted(tensors.items())))


def _pretrained_hashes(
    files: Sequence[Path], model: nn.Module, new: Collection[str]
) -> dict[str, str]:
    """Return the hashes of a checkpoint's tensors that the model has, by their inner names."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored: dict[str, str] = {}
    for file in files:
        for name, h in file_hashes(file).items():
            stored[inner_name(name, prefix)] = h
    tensors: dict[str, str] = {}
    heads = tuple(f"{module}." for module in new)
    converted = False
    for names in _tied_names(model):
        if any(name.startswith(heads) for name in names):
            continue
        inner = [inner_name(name, prefix) for name in names]
        hash_value = next((stored[name] for name in inner if name in stored), None)
        converted |= hash_value is None
        if hash_value is not None:
            tensors |= dict.fromkeys(inner, hash_value)
    if converted:  # transformers renames or joins tensors: count everything that is stored
        tensors |= stored
    return tensors


def inner_name(name: str, prefix: str) -> str:
    """Return a tensor's name inside the pretrained model, with the old names of BERT replaced."""
    name = re.sub(r"LayerNorm\.(gamma|beta)$", _replace_old_name, name)
    return name.removeprefix(prefix) if len(prefix) > 1 else name


def _replace_old_name(old: re.Match[str]) -> str:
    return f"LayerNorm.{'weight' if old[1] == 'gamma' else 'bias'}"


def _tied_names(model: nn.Module) -> Iterator[list[str]]:
    """Yield all names of each tensor that a checkpoint would contain; tied tensors have several.

    Integer buffers (positions, masks) are skipped, as only some versions of a library save them.
    """
    groups: dict[int, list[str]] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, last = name.rpartition(".")
        is_quantized = module in layers and last == "weight"  # its scales are not in the checkpoint
        if is_quantized or (
            tensor.is_floating_point() and (module not in layers or last == "bias")
        ):
            groups.setdefault(id(tensor), []).append(name)
    yield from groups.values()


# -------------------------------------------------------------------------------- the hashes


def file_hashes(file: Path) -> dict[str, str]:
    """Return the hash of every tensor of a safetensors file."""
    facts = file.stat()
    return _file_hashes(file, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_hashes(file: Path, *_stamp: int) -> dict[str, str]:
    """Hash a file's tensors in parallel threads: xxhash and reading release the GIL."""
    entries = read_header(file)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(functools.partial(_tensor_hash, file), entries.values())
        return dict(zip(entries, hashes, strict=True))


def _tensor_hash(file: Path, entry: TensorEntry) -> str:
    state = xxhash.xxh3_128(f"{entry.dtype} {list(entry.shape)} ".encode())
    remaining = entry.end - entry.start
    buffer = memoryview(bytearray(min(CHUNK, remaining)))
    with file.open("rb", buffering=0) as handle:
        handle.seek(entry.start)
        while remaining:
            count = handle.readinto(buffer[: min(CHUNK, remaining)])
            if not count:
                what, hint = "the file became shorter while it was read", "download it again"
                raise IntegrityError(what, str(file), hint)
            state.update(buffer[:count])
            remaining -= count
    return state.hexdigest()


# ------------------------------------------------------------------------------------ the check


def require_base(
    trained_on: Fingerprint | None,
    base: Fingerprint | None,
    recipe: Recipe,
    what: str,
    in_adapter: Collection[str] = (),
) -> Fingerprint | None:
    """Reject a base that is not the one that an adapter or checkpoint was trained on.

    Args:
        trained_on: The fingerprint saved with the adapter; None if another tool made it.
        base: The fingerprint of the recipe's base.
        recipe: Names the base, and may allow another.
        what: The thing that was trained, for messages: `the adapter out/`.
        in_adapter: Names of the tensors that the adapter contains in full.

    Returns:
        The fingerprint to save with results on this base. If the base differs and that was allowed,
        it also records the earlier base.

    Raises:
        IntegrityError: If the base differs, and `model.allow_other_base` is not set.
    """
    unknown = "whether this is its base could not be verified"
    if base is None:
        if trained_on is not None:
            warn(f"{what} was trained on `{trained_on.name}`; {unknown}")
        return None
    if trained_on is None:
        warn(f"{what} has no {BASE_FILE}: {unknown}")
        return base
    differing = trained_on.differing(base, in_adapter)
    if not differing:
        return replace(base, earlier=trained_on.earlier)
    text = f"`{base.name}` is not the base that {what} was trained on: {_describe(differing, base)}"
    if recipe.model.allow_other_base:
        warn(f"{text}; `{OVERRIDE}` allows it")
        other = {"name": trained_on.name, "fingerprint": trained_on.total}
        return replace(base, earlier=(*trained_on.earlier, other))
    revision = f", revision {trained_on.revision}" if trained_on.revision != "main" else ""
    raise IntegrityError(
        text,
        recipe.at("model.name"),
        f"it was trained on `{trained_on.name}`{revision} (fingerprint {trained_on.total}); "
        f"to use this base anyway: `--set {OVERRIDE}=true`",
    )


def _describe(differing: list[str], base: Fingerprint) -> str:
    """Describe which tensors differ, for a message."""
    state = "differs" if differing[0] in base.tensors else "is missing"
    rest = (
        f", and {len(differing) - 1} more of {len(base.tensors)} tensors" if differing[1:] else ""
    )
    return f"`{differing[0]}` {state}{rest}"
