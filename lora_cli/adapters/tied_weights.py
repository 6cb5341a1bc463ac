"""Weights that several modules share, as an embedding and the output layer of a language model do.

PEFT's `modules_to_save` gives each module that it names a copy of its own, also one side of a tie:
the other sides keep the weight of the base. (Both sides may be named, and differ after training.)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

from torch import nn

from lora_cli.adapters.match_names import inside
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Return, for each parameter that stands in several places, all of its names."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def give_own_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Let each named parameter be one of its own, equal to the one that it shared until now.

    Args:
        model: Changed in place. A module that stands in several places is copied for the named one.
        names: Full names of parameters.
    """
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        places = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
        if len(places) > 1:
            module = copy.deepcopy(module)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        old = module._parameters[last]
        assert old is not None
        module._parameters[last] = nn.Parameter(old.detach().clone(), old.requires_grad)


def separate(model: nn.Module, groups: Iterable[Collection[str]]) -> list[str]:
    """Give each parameter of a group its own where some of the group no longer share; return them.

    Args:
        model: Changed in place.
        groups: Names that shared a parameter once, as `tied_groups` returned them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parted: list[str] = []
    for names in groups:
        if len({id(parameters[name]) for name in names}) > 1:
            parted += names
    give_own_parameters(model, parted)
    return parted


def separate_trained(model: nn.Module, in_full: list[str], recipe: Recipe) -> None:
    """Reject half of a tie among the modules trained in full, or give each a weight of its own.

    Raises:
        LoraError: If one of two modules that share a weight is to be trained, and the recipe does
            not allow to part them.
    """
    for names in tied_groups(model):
        owners = {name: name.rpartition(".")[0] for name in names}
        trained = [n for n, owner in owners.items() if any(inside(owner, top) for top in in_full)]
        if not recipe.adapter.ensure_weight_tying:
            give_own_parameters(model, trained)
        elif trained and len(trained) < len(names):
            other = next(owner for name, owner in owners.items() if name not in trained)
            raise LoraError(
                f"`{owners[trained[0]]}` shares its weight with `{other}`",
                recipe.at("adapter.train_modules"),
                "name both, or neither; `adapter.ensure_weight_tying: false` trains a copy of it",
            )
