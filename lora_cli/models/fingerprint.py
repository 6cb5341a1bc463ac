"""Which base an adapter belongs to: a fingerprint of the checkpoint's own tensors.

An adapter loads onto any base of the same shapes, and on a wrong one it answers nonsense. So the
hash of every pretrained tensor is kept beside the adapter, in `base.json`:

    {"name": "roberta-large", "revision": "main", "fingerprint": "…", "earlier": [],
     "tensors": {"encoder.layer.0.attention.self.query.weight": "…", …}}

A tensor's hash (xxh3, 128 bits) is over its dtype, its shape and its bytes as the checkpoint has
them: how the weights are divided among files does not matter, nor the dtype that they are loaded
in. Names are those inside the pretrained model: `BertModel` saves `encoder.…`, and the
`BertForMaskedLM` around it `bert.encoder.…`. Of tied tensors, of which a checkpoint may hold one or
both, each has the hash of the one that is stored. Heads that the task creates do not count:
the adapter holds them.

The hash tells mistakes, not forgery: who can forge a base can write another `base.json` too.
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
CHUNK = 2**24  # bytes that a thread reads at once
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
        """One hash for all of it."""
        lines = "".join(f"{name} {self.tensors[name]}\n" for name in sorted(self.tensors))
        return hashlib.sha256(lines.encode()).hexdigest()[:32]

    def differing(self, other: Fingerprint, in_adapter: Collection[str] = ()) -> list[str]:
        """Return the names of tensors that another base has otherwise, not at all, or besides.

        Args:
            other: Of the other base.
            in_adapter: Names of tensors that the adapter holds in full. What only the other base
                has is no difference then: it was new when the adapter was trained (as the pooler
                that masked language models lack).
        """
        ours, theirs = self.tensors, other.tensors
        besides = [
            name
            for name in theirs.keys() - ours.keys()
            if not any(h == name or h.endswith(f".{name}") for h in in_adapter)
        ]
        return [*(name for name, h in ours.items() if theirs.get(name) != h), *sorted(besides)]

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of the base."""
        named = {"name": self.name, "revision": self.revision, "fingerprint": self.total}
        return {**named, "earlier": list(self.earlier)}

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
        found = Fingerprint(str(value["name"]), str(value["revision"]), tensors, earlier)
        if found.total != value["fingerprint"] or not tensors:
            raise ValueError("its hashes do not add up")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = "restore it from a backup or train again"
        raise IntegrityError("the base's fingerprint cannot be read", str(file), hint) from error
    return found


def fingerprint_of(recipe: Recipe, model: nn.Module, new: Collection[str]) -> Fingerprint | None:
    """Return the fingerprint of the recipe's base; None if it can have none.

    Args:
        recipe: Its `model` section names the checkpoint.
        model: The model that was loaded from it, before anything is attached: says which tensors
            count.
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
        before = f"{part}." if part else ""
        in_part = [name.removeprefix(before) for name in new if name.startswith(before)]
        hashes = _pretrained_hashes(files, module, in_part)
        tensors |= {f"{before}{name}": h for name, h in hashes.items()}
    return Fingerprint(recipe.model.name, recipe.model.revision, dict(sorted(tensors.items())))


def _pretrained_hashes(
    files: Sequence[Path], model: nn.Module, new: Collection[str]
) -> dict[str, str]:
    """Return the hashes of the tensors of a checkpoint that a model has, by their inner names."""
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
        found = next((stored[name] for name in inner if name in stored), None)
        converted |= found is None
        if found is not None:
            tensors |= dict.fromkeys(inner, found)
    if converted:  # transformers names or joins them otherwise: then all that is stored counts
        tensors |= stored
    return tensors


def inner_name(name: str, prefix: str) -> str:
    """Return a tensor's name inside the pretrained model; early BERTs had other words."""
    name = re.sub(r"LayerNorm\.(gamma|beta)$", _modern, name)
    return name.removeprefix(prefix) if len(prefix) > 1 else name


def _modern(old: re.Match[str]) -> str:
    return f"LayerNorm.{'weight' if old[1] == 'gamma' else 'bias'}"


def _tied_names(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of each tensor that a checkpoint would hold, of tied ones all together.

    Integer buffers (positions, masks) are no weights, and some versions of a library save them.
    """
    groups: dict[int, list[str]] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, last = name.rpartition(".")
        is_code = module in layers and last == "weight"  # its scales are in no checkpoint
        if is_code or (tensor.is_floating_point() and (module not in layers or last == "bias")):
            groups.setdefault(id(tensor), []).append(name)
    yield from groups.values()


# -------------------------------------------------------------------------------- the hashes


def file_hashes(file: Path) -> dict[str, str]:
    """Return the hash of every tensor of a safetensors file."""
    facts = file.stat()
    return _file_hashes(file, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_hashes(file: Path, *_stamp: int) -> dict[str, str]:
    """Hash a file's tensors, several at once: xxhash and reading let go of Python's lock."""
    entries = read_header(file)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(functools.partial(_tensor_hash, file), entries.values())
        return dict(zip(entries, hashes, strict=True))


def _tensor_hash(file: Path, entry: TensorEntry) -> str:
    state = xxhash.xxh3_128(f"{entry.dtype} {list(entry.shape)} ".encode())
    left = entry.end - entry.start
    buffer = memoryview(bytearray(min(CHUNK, left)))
    with file.open("rb", buffering=0) as handle:
        handle.seek(entry.start)
        while left:
            count = handle.readinto(buffer[: min(CHUNK, left)])
            if not count:
                what, hint = "the file became shorter while it was read", "download it again"
                raise IntegrityError(what, str(file), hint)
            state.update(buffer[:count])
            left -= count
    return state.hexdigest()


# ------------------------------------------------------------------------------------ the check


def require_base(
    trained_on: Fingerprint | None,
    base: Fingerprint | None,
    recipe: Recipe,
    what: str,
    in_adapter: Collection[str] = (),
) -> Fingerprint | None:
    """Reject a base that is not the one that something was trained on.

    Args:
        trained_on: The fingerprint that is kept beside it; None if another tool made it.
        base: The fingerprint of the recipe's base.
        recipe: Names the base, and may allow another.
        what: What was trained: `the adapter out/`.
        in_adapter: Names of the tensors that it holds in full.

    Returns:
        What to keep beside what is made on the base: its fingerprint, which remembers the other
        base if that was allowed.

    Raises:
        IntegrityError: If the base is another, and `model.allow_other_base` is not set.
    """
    unknown = "whether this is its base could not be verified"
    if base is None:
        if trained_on is not None:
            warn(f"{what} was trained on `{trained_on.name}`; {unknown}")
        return None
    if trained_on is None:
        warn(f"{what} has no {BASE_FILE}: {unknown}")
        return base
    others = trained_on.differing(base, in_adapter)
    if not others:
        return replace(base, earlier=trained_on.earlier)
    text = f"`{base.name}` is not the base that {what} was trained on: {_first_of(others, base)}"
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


def _first_of(others: list[str], base: Fingerprint) -> str:
    """Say which tensors differ."""
    how = "differs" if others[0] in base.tensors else "is missing"
    more = f", and {len(others) - 1} more of {len(base.tensors)} tensors" if others[1:] else ""
    return f"`{others[0]}` {how}{more}"
