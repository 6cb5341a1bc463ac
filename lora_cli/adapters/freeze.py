"""Find the parameters that `adapter.freeze` keeps frozen while the rest of the model is trained.

An entry is `embeddings`, a layer or a range of layers (`3`, `0-5`), or the name of a module. The
modules that the task adds, such as a new head, are always trained: frozen, they would keep their
random initial values.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from lora_cli.adapters.match_names import inside, layer_index, matches, parse_layers
from lora_cli.adapters.targets import absent_layers
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.recipe import Recipe

EMBEDDINGS = "embeddings"
RANGE = re.compile(r"\d+(-\d+)?")


def frozen_parameters(model: nn.Module, recipe: Recipe, head: Collection[str] = ()) -> set[str]:
    """Return the names of the parameters that `adapter.freeze` freezes.

    A parameter that several modules share is listed under each of its names.

    Args:
        model: The base model; may be on the meta device.
        recipe: Its `adapter.freeze` says what is frozen.
        head: Names of the modules that the task created, which are always trained.

    Raises:
        LoraError: For all entries that match nothing, or nothing but modules of the head.
    """
    frozen: set[str] = set()
    problems: list[Problem] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in recipe.adapter.frozen_entries:
        matched, problem = _matched(model, recipe, entry, list(parameters))
        pretrained = {name for name in matched if not any(inside(name, top) for top in head)}
        if problem is None and not pretrained:
            tops = " and ".join(f"`{top}`" for top in head if any(inside(n, top) for n in matched))
            what = f"`{entry}` is part of {tops} alone, which is new and would stay as it was drawn"
            problem = Problem(what, recipe.at("adapter.freeze"), "leave it out")
        problems += [problem] if problem is not None else []
        frozen |= pretrained
    if problems:
        raise LoraError(problems)
    shared = {id(parameters[name]) for name in frozen}
    return {name for name, parameter in parameters.items() if id(parameter) in shared}


def _matched(
    model: nn.Module, recipe: Recipe, entry: str | int, parameters: list[str]
) -> tuple[set[str], Problem | None]:
    """Return the parameters that an entry of `adapter.freeze` matches, or a problem with it."""
    at = recipe.at("adapter.freeze")
    if RANGE.fullmatch(str(entry)):
        layer_numbers = parse_layers(str(entry))
        problems = absent_layers(layer_numbers, parameters, str(entry), at)
        matched = {name for name in parameters if layer_index(name) in layer_numbers}
        return matched, next(iter(problems), None)
    tops = embedding_modules(model) if entry == EMBEDDINGS else []
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if entry == EMBEDDINGS and not tops:
        hint = "name layers or modules; `lora params` lists them"
        return set(), Problem("the model has no embeddings outside its layers", at, hint)
    tops = tops or [name for name in [*names, *parameters] if matches([str(entry)], name)]
    if not tops:
        last_names = dict.fromkeys([EMBEDDINGS, *(name.rpartition(".")[2] for name in names)])
        hint = did_you_mean(str(entry), [n for n in last_names if not n.isdigit()], "the model has")
        return set(), Problem(f"`{entry}` matches no module of the model", at, hint)
    matched = {p for p in parameters if any(p == top or p.startswith(f"{top}.") for top in tops)}
    if not matched:
        what = f"`{entry}` matches {tops[0]}, which has no parameters to freeze"
        return set(), Problem(what, at, "leave it out")
    return matched, None


def embedding_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules and bare parameters that compute the first layer's inputs.

    They are recognised by their kind, since names differ between architectures: embeddings of
    tokens, positions, segments or patches, together with the modules around them that hold no
    layers (BERT's `embeddings`, with its normalisation).
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    containers = {".".join(stack[:n]) for stack in map(_parts_of_stack, names) for n in range(9)}
    inputs, outputs = (_called(model, f"get_{side}_embeddings") for side in ("input", "output"))
    embeddings: dict[str, None] = {
        n: None for n in names if n.rpartition(".")[0] in containers and _embeds(n)
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name in containers or layer_index(name) is not None or module is outputs:
            continue
        embeds = isinstance(module, nn.Embedding) or module is inputs
        if embeds or _embeds(name) or _is_stem(model, name, module, names):
            embeddings[_highest(name, containers)] = None
    return [
        name for name in embeddings if not any(name.startswith(f"{other}.") for other in embeddings)
    ]


def _embeds(name: str) -> bool:
    return "emb" in name.rpartition(".")[2]


def _parts_of_stack(name: str) -> list[str]:
    """Return the parts before the layer's number: `encoder.layer.3.output` -> [encoder, layer]."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return parts[:first]


def _highest(name: str, containers: Collection[str]) -> str:
    """Return the outermost ancestor of a module that contains no layers."""
    while (parent := name.rpartition(".")[0]) and parent not in containers:
        name = parent
    return name


def _is_stem(model: nn.Module, name: str, module: nn.Module, parameters: list[str]) -> bool:
    """Return whether a convolution precedes the layers of the same parent, as in Whisper."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    parent = name.rpartition(".")[0]
    siblings = [p for p in parameters if not parent or p.startswith(f"{parent}.")]
    layer_positions = [i for i, p in enumerate(siblings) if layer_index(p) is not None]
    positions = [i for i, p in enumerate(siblings) if p.startswith(f"{name}.")]
    return bool(layer_positions) and bool(positions) and positions[0] < layer_positions[0]


def _called(model: nn.Module, method: str) -> nn.Module | None:
    try:
        module = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None


# ------------------------------------------------------------------- the depth of parameters


def depths(model: nn.Module, head: Collection[str] = ()) -> dict[str, int]:
    """Return how many layers below the top each parameter lies.

    With L layers, the last one is 1 below the top, the first is L below, and the embeddings are
    L + 1 below. Modules after the last layer, such as a head, are 0 below. Each stack of layers,
    such as an encoder's and a decoder's, is counted from its own top.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    body_names = [name for name in names if not any(inside(name, top) for top in head)]
    counts: dict[str, int] = {}
    for name in body_names:
        if (index := layer_index(name)) is not None:
            stack = ".".join(_parts_of_stack(name))
            counts[stack] = max(counts.get(stack, 0), index + 1)
    below_top = dict.fromkeys(names, 0)
    for name in body_names:
        if (index := layer_index(name)) is not None:
            below_top[name] = counts[".".join(_parts_of_stack(name))] - index
    for module in embedding_modules(model) if counts else []:
        parent = module.rpartition(".")[0]
        heights = [n for stack, n in counts.items() if stack.startswith(f"{parent}.") or not parent]
        for name in body_names:
            if f"{name}.".startswith(f"{module}."):
                below_top[name] = max(heights or counts.values()) + 1
    return below_top
