"""Which parameters stay as they are though the rest of the model is trained: `adapter.freeze`.

An entry is `embeddings`, a layer or a range of layers (`3`, `0-5`), or the name of a module. The
modules that the task adds, such as a new head, are always trained: frozen, they would stay as they
were drawn at random.
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
    """Return the names of the parameters that `adapter.freeze` keeps as they are.

    A parameter that several modules share is named as each of them.

    Args:
        model: The base model; may be on the meta device.
        recipe: Its `adapter.freeze` says what is frozen.
        head: Names of the modules that the task created, which are trained in any case.

    Raises:
        LoraError: With every entry that matches nothing, or only what is new.
    """
    frozen: set[str] = set()
    problems: list[Problem] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in recipe.adapter.frozen_entries:
        found, problem = _matched(model, recipe, entry, list(parameters))
        old = {name for name in found if not any(inside(name, top) for top in head)}
        if problem is None and not old:
            tops = " and ".join(f"`{top}`" for top in head if any(inside(n, top) for n in found))
            what = f"`{entry}` is part of {tops} alone, which is new and would stay as it was drawn"
            problem = Problem(what, recipe.at("adapter.freeze"), "leave it out")
        problems += [problem] if problem is not None else []
        frozen |= old
    if problems:
        raise LoraError(problems)
    shared = {id(parameters[name]) for name in frozen}
    return {name for name, parameter in parameters.items() if id(parameter) in shared}


def _matched(
    model: nn.Module, recipe: Recipe, entry: str | int, parameters: list[str]
) -> tuple[set[str], Problem | None]:
    """Return the parameters that an entry of `adapter.freeze` names, and what is wrong with it."""
    at = recipe.at("adapter.freeze")
    if RANGE.fullmatch(str(entry)):
        wanted = parse_layers(str(entry))
        problems = absent_layers(wanted, parameters, str(entry), at)
        found = {name for name in parameters if layer_index(name) in wanted}
        return found, next(iter(problems), None)
    tops = embedding_modules(model) if entry == EMBEDDINGS else []
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if entry == EMBEDDINGS and not tops:
        hint = "name layers or modules; `lora params` lists them"
        return set(), Problem("the model has no embeddings outside its layers", at, hint)
    tops = tops or [name for name in [*names, *parameters] if matches([str(entry)], name)]
    if not tops:
        last = dict.fromkeys([EMBEDDINGS, *(name.rpartition(".")[2] for name in names)])
        hint = did_you_mean(str(entry), [n for n in last if not n.isdigit()], "the model has")
        return set(), Problem(f"`{entry}` matches no module of the model", at, hint)
    found = {p for p in parameters if any(p == top or p.startswith(f"{top}.") for top in tops)}
    if not found:
        what = f"`{entry}` matches {tops[0]}, which has no parameters to freeze"
        return set(), Problem(what, at, "leave it out")
    return found, None


def embedding_modules(model: nn.Module) -> list[str]:
    """Return the modules, and parameters of none, that make the inputs of the first layer, by name.

    They are found by what they are, since each architecture has other names: what embeds tokens,
    positions, segments or patches, and what is computed together with it (the normalisation in
    BERT's `embeddings`).
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    above = {".".join(stack[:n]) for stack in map(_parts_of_stack, names) for n in range(9)}
    given, output = (_called(model, f"get_{side}_embeddings") for side in ("input", "output"))
    found: dict[str, None] = {
        n: None for n in names if n.rpartition(".")[0] in above and _embeds(n)
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name in above or layer_index(name) is not None or module is output:
            continue
        embeds = isinstance(module, nn.Embedding) or module is given
        if embeds or _embeds(name) or _is_stem(model, name, module, names):
            found[_highest(name, above)] = None
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _embeds(name: str) -> bool:
    return "emb" in name.rpartition(".")[2]


def _parts_of_stack(name: str) -> list[str]:
    """Return the parts of a name before the layer's number: of `encoder.layer.3.output`, two."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return parts[:first]


def _highest(name: str, above: Collection[str]) -> str:
    """Return the outermost module around a module that holds no layers."""
    while (parent := name.rpartition(".")[0]) and parent not in above:
        name = parent
    return name


def _is_stem(model: nn.Module, name: str, module: nn.Module, parameters: list[str]) -> bool:
    """Return whether a convolution comes before the layers of the same parent, as Whisper's do."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    parent = name.rpartition(".")[0]
    siblings = [p for p in parameters if not parent or p.startswith(f"{parent}.")]
    numbered = [i for i, p in enumerate(siblings) if layer_index(p) is not None]
    own = [i for i, p in enumerate(siblings) if p.startswith(f"{name}.")]
    return bool(numbered) and bool(own) and own[0] < numbered[0]


def _called(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


# ----------------------------------------------------------------------- where a layer lies


def depths(model: nn.Module, head: Collection[str] = ()) -> dict[str, int]:
    """Return how many layers below the top each parameter lies.

    The last layer is 1 below, the first of L is L below, and the embeddings L + 1. What is behind
    the last layer, such as a head, is 0 below. Each stack of layers, as those of an encoder and a
    decoder, is counted from its own top.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names_below = [name for name in names if not any(inside(name, top) for top in head)]
    counts: dict[str, int] = {}
    for name in names_below:
        if (index := layer_index(name)) is not None:
            stack = ".".join(_parts_of_stack(name))
            counts[stack] = max(counts.get(stack, 0), index + 1)
    found = dict.fromkeys(names, 0)
    for name in names_below:
        if (index := layer_index(name)) is not None:
            found[name] = counts[".".join(_parts_of_stack(name))] - index
    for module in embedding_modules(model) if counts else []:
        parent = module.rpartition(".")[0]
        around = [n for stack, n in counts.items() if stack.startswith(f"{parent}.") or not parent]
        for name in names_below:
            if f"{name}.".startswith(f"{module}."):
                found[name] = max(around or counts.values()) + 1
    return found
