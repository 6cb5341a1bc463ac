"""Weights that several modules share, as an embedding and the output layer of a language model do.

PEFT's `modules_to_save` gives each module that it names a copy of its own, also one side of a tie:
the other sides keep the weight of the base. (Both sides may be named, and differ after training.)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

from torch import nn


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
