"""Read the adapters to combine, and check that they are compatible.

The base, the task and the labels affect the output as well as the matrices, so they have to be the
same in all adapters. Modules trained in full must be equal, or the user chooses whose are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lora_cli.adapters.find_adapter import shown_name
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.errors import LoraError, Problem, warn
from lora_cli.export.low_rank_pairs import AdapterParts, is_plain_lora, parts_of
from lora_cli.recipe import (
    RECIPE_FILE,
    Recipe,
    computing_values,
    load_adapter_recipe,
    read_computation,
)

MUST_AGREE = ("task.type", "task.labels", "task.problem")


@dataclass
class Source:
    """One of the adapters to combine."""

    name: str
    """The folder's name for messages."""
    saved: AdapterFolder
    recipe: Recipe | None
    parts: AdapterParts
    weight: float


def read_source(path: Path, weight: float) -> Source:
    """Read one of the adapters, which has to be plain LoRA.

    Args:
        path: The adapter's folder.
        weight: The factor of its update.

    Raises:
        LoraError: If it is of another type, or trains biases, single parameters or token rows.
    """
    saved = read_adapter(path)
    if saved.file is not None:
        what = "a file of another tool has names of its own, which only the base tells"
        hint = (
            f"make a folder of it: `lora export --adapter {path} --for peft --to DIR --base BASE`"
        )
        raise LoraError(what, str(path), hint)
    if saved.type != "lora":
        what = f"an adapter of type `{saved.type}` cannot be combined with others"
        hint = "only LoRA's updates can be added: merge it into its base alone, with `lora merge`"
        raise LoraError(what, str(path), hint)
    if not is_plain_lora(saved):
        what = "an adapter of single parameters (experts) cannot be combined with others"
        if saved.config.get("trainable_token_indices"):
            what = "an adapter with trained rows of tokens cannot be combined with others"
        hint = "merge it into its base alone, with `lora merge`"
        raise LoraError(what, str(path), hint)
    parts = parts_of(saved)
    if saved.config.get("bias") not in (None, "none") or parts.biases:
        what = "it has trained biases, and no method combines those"
        hint = (
            "train it with `adapter.bias: none`, or merge it into its base alone, with `lora merge`"
        )
        raise LoraError(what, str(path), hint)
    if grouped := [name for name, pair in parts.pairs.items() if pair.is_grouped]:
        what = f"`{grouped[0]}` is a convolution of several groups, whose updates cannot be added"
        raise LoraError(what, str(path), "train without it: `adapter.exclude_modules`")
    recipe = load_adapter_recipe(path) if (path / RECIPE_FILE).is_file() else None
    return Source(shown_name(path), saved, recipe, parts, weight)


def require_same_use(sources: list[Source]) -> None:
    """Reject adapters of different bases, tasks or labels.

    Raises:
        LoraError: For all differences.
    """
    first, problems = sources[0], []
    for other in sources[1:]:
        if what := _other_base(first, other):
            hint = "combine adapters that were trained on one base; `base.json` says on which"
            problems.append(Problem(what, other.name, hint))
        if what := _other_task(first, other):
            hint = "only adapters of the same task, with the same labels in the same order, can be "
            problems.append(Problem(what, other.name, f"{hint}combined"))
        shapes = {name: pair.a.shape[1:] for name, pair in first.parts.pairs.items()}
        for name, pair in other.parts.pairs.items():
            if shapes.get(name, pair.a.shape[1:]) != pair.a.shape[1:]:
                what = f"`{name}` has other dimensions than in {first.name}"
                problems.append(Problem(what, other.name, "are they of the same base?"))
                break
    if problems:
        raise LoraError(problems)


def _other_base(first: Source, other: Source) -> str | None:
    """Return how the bases of two adapters differ, or None."""
    base, other_base = first.saved.base, other.saved.base
    if base is not None and other_base is not None:
        if tensors := base.differing(other_base, (*first.parts.in_full, *other.parts.in_full)):
            return (
                f"it was trained on `{other_base.name}`, which is not the base of {first.name}, "
                f"`{base.name}`: `{tensors[0]}` differs"
            )
    else:
        names = [_named_base(source) for source in (first, other)]
        if names[0] != names[1]:
            return f"it was trained on `{names[1]}`, and {first.name} on `{names[0]}`"
        warn(f"whether {first.name} and {other.name} have the same base could not be verified")
    facts = [read_computation(source.saved.path) for source in (first, other)]
    if facts[0] is None or facts[1] is None:
        return None
    for key, description in (("tokenizer", "tokenizer"), ("processor", "processor of inputs")):
        if facts[0]["base"].get(key) != facts[1]["base"].get(key):
            return f"it was trained with another {description} than {first.name}"
    return None


def _named_base(source: Source) -> str | None:
    """Return the base in PEFT's configuration, with its revision unless that is `main`."""
    config = source.saved.config
    revision = config.get("revision") or "main"
    name: str | None = config.get("base_model_name_or_path")
    return name if revision == "main" else f"{name}@{revision}"


def _other_task(first: Source, other: Source) -> str | None:
    """Return how the tasks of two adapters differ, or None."""
    kinds = [source.saved.config.get("task_type") for source in (first, other)]
    if kinds[0] != kinds[1]:
        return f"it was trained for `{kinds[1]}`, and {first.name} for `{kinds[0]}`"
    if first.recipe is None or other.recipe is None:
        return None
    values, others = computing_values(first.recipe), computing_values(other.recipe)
    for key in MUST_AGREE:
        if values.get(key) != others.get(key):
            return f"its `{key}` is {others.get(key)}, and that of {first.name} {values.get(key)}"
    return None


def differing_settings(sources: list[Source]) -> list[str]:
    """Return notes on other settings that differ; those of the first adapter are kept."""
    first, lines = sources[0], []
    for other in sources[1:]:
        if first.recipe is None or other.recipe is None:
            continue
        values, other_values = computing_values(first.recipe), computing_values(other.recipe)
        values["model.quantization"] = first.recipe.model.quantization
        other_values["model.quantization"] = other.recipe.model.quantization
        lines += [
            f"`{key}` is {values[key]} in {first.name} and {other_values[key]} in {other.name}: "
            "the first is kept"
            for key in values
            if key.startswith(("task.", "model."))
            and key in other_values
            and values[key] != other_values[key]
        ]
    return lines


def modules_in_full(
    sources: list[Source], head: Path | None
) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    """Return the modules trained in full, which are equal in all, or those of the chosen adapter.

    Args:
        sources: The adapters.
        head: The folder of the adapter whose modules are used; None if they have to be equal.

    Returns:
        The tensors by parameter name, and the configuration's `modules_to_save`.

    Raises:
        LoraError: If they differ and none is chosen, or the choice is not one of the adapters.
    """
    chosen = sources[0]
    if head is not None:
        matching = [s for s in sources if s.saved.path.absolute() == head.absolute()]
        if not matching:
            names = ", ".join(source.name for source in sources)
            raise LoraError(f"{head} is not one of the adapters", "--head", f"choose of {names}")
        chosen = matching[0]
    elif (other := next((s for s in sources[1:] if _differ(sources[0], s)), None)) is not None:
        tops = sorted({n.rpartition(".")[0] for s in (chosen, other) for n in s.parts.in_full})
        shown = ", ".join(f"`{name}`" for name in tops[:3]) + (", …" if len(tops) > 3 else "")
        raise LoraError(
            f"{shown}, trained in full, differs between {chosen.name} and {other.name}",
            "--head",
            f"such modules are not averaged; say whose to take: `--head {chosen.name}`",
        )
    return chosen.parts.in_full, chosen.saved.config.get("modules_to_save")


def _differ(first: Source, other: Source) -> bool:
    """Return whether the modules trained in full differ between two adapters."""
    a, b = first.parts.in_full, other.parts.in_full
    return a.keys() != b.keys() or any(not torch.equal(a[n], b[n]) for n in a)
