"""Combine several adapters of one base into one adapter, in the format of `lora train`.

Only low-rank matrices are combined; heads and other modules trained in full are never averaged.
`combine_sources` checks that the adapters are compatible.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_cli import __version__
from lora_cli.adapters.find_adapter import shown_name
from lora_cli.adapters.peft_format.adapter_folder import (
    AdapterFolder,
    read_adapter,
    weights_sha256,
    write_adapter_files,
)
from lora_cli.adapters.peft_format.tensor_names import without_prefix
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.export.adapter_changes import WeightedAdapter
from lora_cli.export.combine_methods import Method, combine_pairs, concatenated
from lora_cli.export.combine_names import BY_SVD, METHODS
from lora_cli.export.combine_sources import (
    Source,
    differing_settings,
    modules_in_full,
    read_source,
    require_same_use,
)
from lora_cli.export.low_rank_pairs import (
    Pair,
    peft_tensors_of,
    plain_config,
    squared_norms,
    with_equal_ranks,
)
from lora_cli.export.source_files import copy_processor
from lora_cli.export.target_folder import locked_target
from lora_cli.files import new_folder, write_json
from lora_cli.recipe import (
    COMPUTATION_FILE,
    RECIPE_FILE,
    dump_recipe,
)
from lora_cli.reporting.model_card import code_span, write_derived_card

COMBINE_FILE = "combine.json"
EXACT = 1e-5  # relative distance below which an update counts as the weighted sum


@dataclass
class CombineResult:
    """The result of `lora combine`."""

    folder: Path
    modules: int
    rank: int
    distance: float
    """Distance from the weighted sum of the adapters' updates, relative to the sum."""
    notes: list[str] = field(default_factory=list)


def combine_adapters(
    adapters: Sequence[Path],
    to: Path,
    method: Method,
    weights: Sequence[float] | None = None,
    head: Path | None = None,
) -> CombineResult:
    """Combine several adapters, and write the result.

    Args:
        adapters: The adapters' folders; the recipe and the tokenizer of the first are kept.
        to: The folder to create; it must not exist, or be empty.
        method: The method that combines the updates of a module.
        weights: The factor of each adapter's update; None for 1, the sum of all.
        head: The adapter whose modules trained in full are used, if they differ.

    Raises:
        LoraError: If the adapters cannot be combined, with all reasons.
        IntegrityError: If a folder is damaged, or the result contradicts the method.
    """
    weights = list(weights or [1.0] * len(adapters))
    with locked_target(to):
        sources = [read_source(path, w) for path, w in zip(adapters, weights, strict=True)]
        require_same_use(sources)
        in_full, top_names = modules_in_full(sources, head)
        _require_ranks(sources, method)
        pairs = _combined(sources, method)
        distance = _distance(sources, pairs)
        if method.name == "cat" and not distance <= EXACT:
            what = f"the combined update differs from the sum by {distance:.1e} of it"
            hint = "please report this: concatenating should be exact"
            raise IntegrityError(what, "--method cat", hint)
        first = sources[0]
        config = plain_config(first.saved.config, pairs, top_names)
        origin = _origin(sources, method, head, distance)
        tensors = peft_tensors_of(pairs, in_full)
        parts = sorted({part for source in sources for part in source.saved.parts})
        with new_folder(to) as folder:
            write_adapter_files(folder, config, tensors, parts)
            _write_origin(folder, first, config, origin, to)
        read_adapter(to)
    return CombineResult(to, len(pairs), config["r"], distance, differing_settings(sources))


def sum_of_adapters(
    adapters: Sequence[Path], weights: Sequence[float], head: Path | None = None
) -> tuple[AdapterFolder, list[WeightedAdapter]]:
    """Return one adapter that equals the weighted sum of several, and each of them.

    Args:
        adapters: The adapters' folders.
        weights: The factor of each adapter's update.
        head: The adapter whose modules trained in full are used, if they differ.

    Returns:
        The joint adapter; and the single adapters, with the modules trained in full that are used.

    Raises:
        LoraError: If the adapters cannot be added, with all reasons.
    """
    sources = [read_source(path, weight) for path, weight in zip(adapters, weights, strict=True)]
    require_same_use(sources)
    in_full, top_names = modules_in_full(sources, head)
    pairs = _combined(sources, Method("cat"))
    first = sources[0].saved
    config = plain_config(first.config, pairs, top_names)
    tensors = {without_prefix(n): t for n, t in peft_tensors_of(pairs, in_full).items()}
    verified = all(source.saved.verified for source in sources)
    joint = replace(first, config=config, tensors=tensors, verified=verified)
    each = []
    for source in sources:
        left_out = frozenset(source.parts.in_full.keys() - in_full.keys())
        used = {n: in_full.get(n, t) for n, t in source.saved.tensors.items() if n not in left_out}
        source_config = {**source.saved.config, "modules_to_save": top_names}
        saved = replace(source.saved, config=source_config, tensors=used)
        is_used = source.parts.in_full is in_full
        each.append(WeightedAdapter(saved, source.weight, is_used, left_out))
    return joint, each


# ------------------------------------------------------------------------------------- combining


def _by_module(sources: list[Source]) -> dict[str, list[tuple[float, Pair]]]:
    """Return the updates of each module that any adapter adapts, with their weights."""
    names = sorted({name for source in sources for name in source.parts.pairs})
    return {
        name: [(s.weight, s.parts.pairs[name]) for s in sources if name in s.parts.pairs]
        for name in names
    }


def _require_ranks(sources: list[Source], method: Method) -> None:
    """Reject different ranks if the method adds matrices entry by entry."""
    if method.name == "cat" or method.name in BY_SVD:
        return
    for name, weighted in _by_module(sources).items():
        ranks = sorted({pair.rank for _, pair in weighted})
        if len(ranks) > 1:
            raise LoraError(
                f"`{name}` has the ranks {' and '.join(map(str, ranks))}, and `{method.name}` adds "
                "matrices of one rank",
                f"--method {method.name}",
                "use `--method cat` or `svd`, which take any ranks",
            )


def _combined(sources: list[Source], method: Method) -> dict[str, Pair]:
    """Return one update for each module, all with the same rank and scale 1."""
    if method.rank is None:  # the largest of all modules, to which others would be padded
        ranks = [pair.rank for source in sources for pair in source.parts.pairs.values()]
        method = replace(method, rank=max(ranks))
    pairs = {n: combine_pairs(n, pairs, method) for n, pairs in _by_module(sources).items()}
    for name, pair in pairs.items():
        if not bool(pair.a.isfinite().all() and pair.b.isfinite().all()):
            what = f"the combined update of `{name}` has entries that are not finite"
            raise LoraError(what, "--weights", "choose smaller weights")
    return with_equal_ranks(pairs)


def _distance(sources: list[Source], pairs: dict[str, Pair]) -> float:
    """Return the distance of the update from the weighted sum, relative to the sum."""
    distance = norm = 0.0
    for name, weighted in _by_module(sources).items():
        total = concatenated(weighted)
        part, _ = squared_norms([(1.0, total), (-1.0, pairs[name])])
        distance += max(part, 0.0)
        norm += squared_norms([(1.0, total)])[0]
    return math.sqrt(distance / norm) if norm > 0 else float(distance > 0)


# --------------------------------------------------------------------------------------- writing


def _origin(
    sources: list[Source], method: Method, head: Path | None, distance: float
) -> dict[str, Any]:
    """Return the facts of `combine.json`."""
    facts: dict[str, Any] = {"lora_version": __version__, "method": method.name}
    if method.density < 1:
        facts["density"] = method.density
    if method.name.startswith("dare"):
        facts["seed"] = method.seed
    if head is not None:
        facts["head"] = shown_name(head)
    facts["adapters"] = [
        {
            "folder": source.name,
            "weight": source.weight,
            "sha256": weights_sha256(source.saved.path),
        }
        for source in sources
    ]
    return facts | {"distance_from_sum": distance}


def _write_origin(
    folder: Path, first: Source, config: dict[str, Any], origin: dict[str, Any], to: Path
) -> None:
    """Write the files besides the tensors: fingerprint, recipe, tokenizer, card and origin."""
    write_json(folder / COMBINE_FILE, origin)
    if first.saved.base is not None:
        first.saved.base.write(folder)
    copy_processor(first.saved.path, folder)
    if (first.saved.path / COMPUTATION_FILE).is_file():
        shutil.copyfile(first.saved.path / COMPUTATION_FILE, folder / COMPUTATION_FILE)
    if first.recipe is None:
        return
    recipe = first.recipe.with_values(
        {
            "adapter.from_": None, "adapter.rank": config["r"], "adapter.alpha": config["r"],
            "adapter.init": "default", "adapter.dropout": 0.0, "adapter.use_rslora": False,
            "adapter.bias": "none",
            "adapter.target_modules": config["target_modules"], "adapter.exclude_modules": None,
            "adapter.layers": None, "adapter.rank_pattern": {}, "adapter.alpha_pattern": {},
            "output_dir": str(to.absolute()),
        }
    )  # fmt: skip
    recipe = recipe.with_origin(replace(recipe.origin, places={}))
    (folder / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    write_derived_card(folder, recipe, "Made of", _card_text(origin))


def _card_text(origin: dict[str, Any]) -> str:
    """Return the text of the card about the combined adapters."""
    method = f"`{origin['method']}` ({METHODS[origin['method']]})"
    for key in ("density", "seed"):
        method += f", {key} {origin[key]}" if key in origin else ""
    if "head" in origin:
        method += f", modules trained in full from {code_span(origin['head'])}"
    far = origin["distance_from_sum"]
    is_exact = "it is the weighted sum" if far <= EXACT else f"{far:.1%} away from the weighted sum"
    rows = [
        f"- {code_span(one['folder'])}, weight {one['weight']:g}, SHA-256 `{one['sha256']}`"
        for one in origin["adapters"]
    ]
    return f"Combined by {method} of these adapters; {is_exact}:\n\n" + "\n".join(rows)
