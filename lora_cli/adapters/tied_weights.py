"""Find and untie tied weights, such as those of a language model's embedding and output layer.

PEFT's `modules_to_save` copies each module that it names, even if its weight is tied: the modules
that are not named keep the weight of the base. (If both are named, they may differ after training.)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

from torch import nn

from lora_cli.adapters.match_names import inside
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Return all names of each parameter that has more than one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each named shared parameter by an equal parameter of its own.

    Args:
        model: Changed in place. A module that is used in several places is copied for the name.
        names: Full names of parameters.
    """
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        paths = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
        if len(paths) > 1:
            module = copy.deepcopy(module)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        old = module._parameters[last]
        assert old is not None
        module._parameters[last] = nn.Parameter(old.detach().clone(), old.requires_grad)


def untie_differing(model: nn.Module, groups: Iterable[Collection[str]]) -> list[str]:
    """Untie all parameters of each group whose members are no longer all the same parameter.

    Args:
        model: Changed in place.
        groups: Names that used to share a parameter, as `tied_groups` returned them.

    Returns:
        The names of the untied parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    differing: list[str] = []
    for names in groups:
        if len({id(parameters[name]) for name in names}) > 1:
            differing += names
    untie(model, differing)
    return differing


def untie_trained(model: nn.Module, in_full: list[str], recipe: Recipe) -> None:
    """Untie the modules trained in full, or reject a tie of which only a part is to be trained.

    Raises:
        LoraError: If only some of the modules that share a weight are to be trained, and
            `adapter.ensure_weight_tying` is true.
    """
    for names in tied_groups(model):
        owners = {name: name.rpartition(".")[0] for name in names}
        trained = [n for n, owner in owners.items() if any(inside(owner, top) for top in in_full)]
        if not recipe.adapter.ensure_weight_tying:
            untie(model, trained)
        elif trained and len(trained) < len(names):
            other = next(owner for name, owner in owners.items() if name not in trained)
            raise LoraError(
                f"`{owners[trained[0]]}` shares its weight with `{other}`",
                recipe.at("adapter.train_modules"),
                "name both, or neither; `adapter.ensure_weight_tying: false` trains a copy of it",
            )
