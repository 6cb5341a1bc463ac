"""Handle the buffers of modules trained in full, such as batch normalisation's running statistics.

PEFT saves the modules of `modules_to_save` with their buffers, and cannot load them without. This
tool trains no buffers: it saves those of the base, and a file's buffers must equal the base's.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from lora_cli.adapters.match_names import inside
from lora_cli.adapters.peft_format.tensor_names import PREFIX
from lora_cli.models.bundle import is_frozen


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint of the model holds, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in parameters}


def buffers_in_full(model: nn.Module, in_full: Collection[str]) -> dict[str, Tensor]:
    """Return the buffers of the modules that are trained in full, under PEFT's names."""
    return {
        PREFIX + name: buffer
        for name, buffer in persistent_buffers(model).items()
        if any(inside(name.rpartition(".")[0], top) for top in in_full)
        and not is_frozen(model, name)
    }


def without_buffers(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter, by names without PEFT's prefix, except its buffers."""
    buffers = persistent_buffers(model)
    return {name: tensor for name, tensor in tensors.items() if name not in buffers}
